"""The rows of a step as this process measures them: micro-batches, and its share among ranks.

What is measured are sums over parts of a batch. Each is rounded to a multiple of 2^-32, so that
adding them up is exact and neither the order nor who adds them matters: any number of ranks whose
parts are the same rows gives the same bits.
"""

import random

_GRID = 2.0**32  # sums up to 2^21 stay exact in float64


class Order:
    """The rows of a step, a function of (seed, step) alone.

    Permutations of all rows, one an epoch, are laid end to end and cut into batches.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        self._num_rows, self._size, self._seed = num_rows, batch_size, seed
        self._orders: dict[int, list[int]] = {}

    def __call__(self, step: int) -> list[int]:
        """Row numbers of the batch."""
        places = range(step * self._size, (step + 1) * self._size)
        return [self._order(i // self._num_rows)[i % self._num_rows] for i in places]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(self._num_rows))
            random.Random(f"{self._seed}/batches/{epoch}").shuffle(order)
            self._orders = {k: v for k, v in self._orders.items() if k >= epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch]

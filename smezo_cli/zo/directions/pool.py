"""Perturb along numbers that are used again and again: a small pool of uniforms (PeZO)."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from smezo_cli.zo.directions.base import DirectionContext
from smezo_cli.zo.directions.dense import Dense, DenseMover
from smezo_cli.zo.move import Key, Move
from smezo_cli.zo.noise import hash64, stream_key, uniform_at
from smezo_cli.zo.passes.by_index import PassesByIndex
from smezo_cli.zo.passes.choose import Passes, choose_looked_up
from smezo_cli.zo.passes.draw import Rule
from smezo_cli.zo.passes.eager import EagerPasses
from smezo_cli.zo.targets import check, one_of

#: Taps of a maximal linear feedback shift register of so many bits: its state runs through all
#: numbers but 0. (Tables of primitive polynomials; a test counts the period.)
TAPS = {
    **{4: (4, 3), 5: (5, 3), 6: (6, 5), 7: (7, 6), 8: (8, 6, 5, 4), 9: (9, 5), 10: (10, 7)},
    **{11: (11, 9), 12: (12, 6, 4, 1), 13: (13, 4, 3, 1), 14: (14, 5, 3, 1), 15: (15, 14)},
    **{16: (16, 15, 13, 4)},
}


def register_states(bits: int) -> list[int]:
    """Return the 2^bits - 1 states of a linear feedback shift register, in their order from 1."""
    state, found, taps = 1, [], [bits - tap for tap in TAPS[bits]]
    for _ in range(2**bits - 1):
        found.append(state)
        fed = 0
        for tap in taps:
            fed ^= state >> tap
        state = (state >> 1) | ((fed & 1) << (bits - 1))
    return found


class Pool(Dense):
    """Make u(key) of a pool of N = 2^bits - 1 numbers in (-1, 1), laid end to end over all weights.

    The weights count as one vector, tensor after tensor by name. ``generators=0``: the pool is
    drawn once, and each direction begins where the one before ended: number t Q + q at place
    (t Q + q) s mod N, with s the number of weights, or the next above it that has no factor in
    common with N, so that N directions pass before one comes again. ``generators=G``: the pool is
    the sequence of a shift register; G of them run side by side from places that the key draws,
    and weight i reads number i // G of register (i + i // G) mod G, so that they take turns.

    Each direction is scaled to the expected norm of d Gaussian numbers.

    Args:
        bits: 4 to 16.
        generators: G; 0: one pool for all.
        modulus: "exact", or "power_of_two": the scale is rounded to the nearest one, a shift.
        num_queries: Q, directions in a step.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, bits: int, generators: int, modulus: str, num_queries: int) -> None:
        super().__init__("gaussian")
        check(bits in TAPS, f"bits={bits}: 4 to 16")
        check(generators >= 0, f"generators={generators}: 0 or more")
        one_of("modulus", modulus, ("exact", "power_of_two"))
        self.bits, self.generators, self.modulus = bits, generators, modulus
        self._num_queries = num_queries
        self.size: int = 2**bits - 1
        # The numbers of several registers have a long period, and are looked up one by one.
        self.has_compiled_passes = not generators

    def bind(self, context: DirectionContext, num_terms: int) -> None:
        """See :class:`Direction`."""
        self._pools: dict[torch.device, Tensor] = {}
        self._pool = self._drawn(context.seed)
        self._twice = torch.cat((self._pool, self._pool))
        self.kept_bytes = self._pool.nbytes + self._twice.nbytes
        squares = [x * x for x in self._pool.tolist()]
        self._sums: list[float] = [
            0.0,
            *itertools.accumulate(squares + squares),
        ]  # over the pool, twice
        self._starts: dict[str, int] = {}
        self._total = 0  # weights
        for target in sorted(context.targets, key=lambda t: t.name):
            self._starts[target.name] = self._total
            self._total += target.parameter.numel()
        super().bind(context, num_terms)

    def _drawn(self, seed: int) -> Tensor:
        if self.generators:
            states = torch.tensor(register_states(self.bits), dtype=torch.float32)
            numbers: Tensor = (states * 2 - 2**self.bits) / 2**self.bits
            return numbers
        key = torch.tensor(stream_key(seed, "pool"))
        drawn: Tensor = uniform_at(torch.arange(self.size), self.size, key)
        return drawn * 2 - 1

    @property
    def reach(self) -> int:
        """Return how many dimensions all directions together can span, at most."""
        return min(self._total, self.size * max(1, self.generators))

    def _choose_passes(self, rule: Rule, backend: str, device: torch.device) -> tuple[Passes, str]:
        period = None if self.generators else self._period
        return choose_looked_up(rule, self._values, period, backend, device)

    def _eager(self, rule: Rule) -> EagerPasses:
        return PassesByIndex(rule, self._values)

    def _values(self, index: Tensor, key: Tensor) -> Tensor:
        """Return the numbers at flat places of a tensor: key is its start, and that of its step."""
        if index.device not in self._pools:
            self._pools[index.device] = self._pool.to(index.device)
        pool = self._pools[index.device]
        place = index + key[0]
        if not self.generators:
            return pool[(place + key[1]) % self.size]
        turn = place // self.generators
        lane = (place + turn) % self.generators
        starts = hash64(torch.arange(self.generators, device=index.device), key[1:].repeat(2))
        return pool[(turn + (starts % self.size)[lane]) % self.size]

    def _period(self, key: tuple[int, int]) -> Tensor:
        """Return the pool as a tensor of this key reads it, from its first weight on."""
        start = sum(key) % self.size
        return self._twice[start : start + self.size]

    def keys(self, *parts: str | int) -> list[tuple[int, int]]:
        if parts[0] != "z":
            return super().keys(*parts)
        if parts not in self._streams:
            _, step, query = parts
            offset = self._offset(Key(int(step), int(query)))
            self._streams[parts] = [(self._starts[t.name], offset) for t in self.targets]
        return self._streams[parts]

    def _offset(self, key: Key) -> int:
        """Return where a direction begins in the pool; of generators, the key of all its places."""
        if self.generators:
            return stream_key(self._seed, "z", key.step, key.query)[0]
        stride = self._total % self.size
        while math.gcd(stride, self.size) > 1:  # or some places would never be begun at
            stride += 1
        return (key.step * self._num_queries + key.query) * stride % self.size

    def scale(self, key: Key) -> float:
        """Return what a direction is multiplied by, so that its norm is that of Gaussian noise."""
        d = self._total
        expected = math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
        whole, rest = divmod(d, self.size)
        start = 0 if self.generators else self._offset(key)
        found = whole * self._sums[self.size] + self._sums[start + rest] - self._sums[start]
        if self.generators:  # each register reads on from its own place; in the mean, a pool's
            found = d * self._sums[self.size] / self.size
        factor = expected / math.sqrt(found)
        return factor if self.modulus == "exact" else 2.0 ** round(math.log2(factor))

    def mover(self, step: int, move: Move) -> DenseMover:
        """See :class:`Direction`."""
        scaled = tuple(
            t._replace(coefficient=t.coefficient * self.scale(t.key)) for t in move.terms
        )
        found = super().mover(step, Move(scaled, move.decay, move.base))
        found.move = move
        return found

    def identity(self) -> dict[str, Any]:
        """See :class:`Direction`."""
        return {
            "noise": "pool",
            "bits": self.bits,
            "generators": self.generators,
            "modulus": self.modulus,
        }

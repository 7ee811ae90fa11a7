"""Have small draws of noise remembered: tests of methods make the same ones again and again.

A step draws z for each of its losses and for its update, and tests of one claim take the same seed,
names and steps with every method. Remembered is what :func:`smezo_cli.zo.noise.pair` returned for
the same key, counters and kind; that it is a function of these is what tests/zo/test_noise.py says
of the one that remembers nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from smezo_cli.zo import noise

_COUNTERS, _DRAWS = 64, 30_000  # of one draw, and in all: some 30 MB

Pair = Callable[[Tensor, noise.Words, str], tuple[Tensor, Tensor]]


def remembering(pair: Pair) -> Pair:
    """Return a function that gives copies of what ``pair`` gives."""
    known: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def quick(counter: Tensor, key: noise.Words, kind: str) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or not _is_plain(counter, key):
            return pair(counter, key, kind)
        words = key.tolist() if isinstance(key, Tensor) else key
        asked = (kind, *words, *counter.tolist())
        if asked not in known:
            if len(known) == _DRAWS:
                known.clear()
            known[asked] = pair(counter, key, kind)
        first, second = known[asked]
        return first.clone(), second.clone()

    return quick


def _is_plain(counter: Tensor, key: noise.Words) -> bool:
    """Whether a draw is small and of numbers, and nobody looks at how it is computed."""
    if type(counter) is not Tensor or counter.ndim != 1 or len(counter) > _COUNTERS:
        return False
    if counter.device.type != "cpu" or (isinstance(key, Tensor) and key.ndim != 1):
        return False
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return not modes and torch._C._functorch.peek_interpreter_stack() is None

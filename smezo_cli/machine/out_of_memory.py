"""A computation that the memory is too small for is told apart, and can be tried again."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from smezo_cli.machine.allocator import give_back

# torch's words for an allocation on a CPU that fails; on CUDA it has an error of its own.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


class OutOfRoom(MemoryError):
    """The memory was too small for a loss; the weights are those before the step."""


@contextmanager
def in_room() -> Iterator[None]:
    """Inside, an allocation that fails becomes an :class:`OutOfRoom`, which holds no tensors."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if isinstance(error, OutOfRoom) or not (known or any(w in str(error) for w in _WORDS)):
            raise
        line = str(error).partition("\n")[0]
    else:
        return
    raise OutOfRoom(line)


def make_room() -> None:
    """Let go of what a computation that failed has left."""
    gc.collect()
    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Recognise out-of-memory errors, so that a step can be retried with a smaller micro-batch."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from smezo_cli.machine.allocator import give_back

# torch's words for an allocation on a CPU that fails; on CUDA it has an error of its own.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


class OutOfMemory(MemoryError):
    """Say that the memory was too small for a loss; the weights are those before the step."""


@contextmanager
def detecting_out_of_memory() -> Iterator[None]:
    """Raise :class:`OutOfMemory`, which holds no tensors, where an allocation inside fails."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if isinstance(error, OutOfMemory) or not (known or any(w in str(error) for w in _WORDS)):
            raise
        line = str(error).partition("\n")[0]
    else:
        return
    raise OutOfMemory(line)


def release_memory() -> None:
    """Free the memory that a failed computation has left behind."""
    gc.collect()
    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

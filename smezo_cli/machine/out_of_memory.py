"""Recognise out-of-memory errors, so that a computation can be repeated with fewer rows at once."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from smezo_cli.errors import UserError
from smezo_cli.machine.allocator import give_back

R = TypeVar("R")
T = TypeVar("T")

# torch's words for an allocation on a CPU that fails; on CUDA it has an error of its own.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")

#: what helps wherever the memory is too small for a model
LESS = "take dtype=bfloat16, +model.device_map=auto over several GPUs, or device=cpu"
#: what helps where one row is too much
SHORTER = f"lower model.max_length, or {LESS}"


class OutOfMemory(MemoryError):
    """Say that the memory was too small for a loss; the weights are those before the step."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether this is what torch or Python raises where an allocation fails."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


@contextmanager
def detecting_out_of_memory() -> Iterator[None]:
    """Raise :class:`OutOfMemory`, which holds no tensors, where an allocation inside fails."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        line = str(error).partition("\n")[0]
    else:
        return
    raise OutOfMemory(line)


@contextmanager
def refusing_out_of_memory(what: str, helps: str = LESS) -> Iterator[None]:
    """Raise UserError, one sentence, where an allocation inside fails.

    Args:
        what: the memory is too small for.
        helps: what the user may do.
    """
    try:
        with detecting_out_of_memory():
            yield
    except OutOfMemory as error:
        raise UserError(f"the memory is too small {what} ({error}): {helps}.") from error


class Halving:
    """Compute batches whole while they fit into the memory, and in smaller parts once one did not.

    A part that does not fit is halved, down to one row. What was too large is not tried again: the
    batches that follow begin with the size that did fit.

    Args:
        say: receives a line when a batch had to be halved.

    Attributes:
        most: padded tokens of a part, at most, unless one row has more; None: all of a batch.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.most: int | None = None
        self._say = say

    def __call__(
        self, batch: Sequence[R], tokens: Callable[[R], int], compute: Callable[[Sequence[R]], T]
    ) -> list[T]:
        """Return what is computed of each part of a batch, in order.

        Args:
            batch: the rows.
            tokens: returns how many a forward takes for a row.
            compute: computes a part.

        Raises:
            UserError: a single row is too much.
        """
        found, start, refused = list[T](), 0, 0
        while start < len(batch):
            rest = batch[start:]
            part = rest
            if self.most is not None:
                part = rest[: max(1, self.most // max(map(tokens, rest)))]
            try:
                with detecting_out_of_memory():
                    found.append(compute(part))
            except OutOfMemory as error:
                if len(part) == 1:
                    raise UserError(
                        f"the memory is too small for a forward over one row ({error}): {SHORTER}."
                    ) from error
            else:
                start += len(part)
                continue
            # The error held tensors, which are free only here.
            self.most = max(map(tokens, rest)) * len(part) // 2
            refused = refused or len(part)
            release_memory()
        if refused:
            self._say(
                f"  out of memory with {refused} rows at once: evaluations go on with at most "
                f"{self.most} tokens in a forward"
            )
        return found


def release_memory() -> None:
    """Free the memory that a failed computation has left behind."""
    gc.collect()
    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

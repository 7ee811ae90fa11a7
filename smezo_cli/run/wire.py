"""Carry numbers, tensors and bytes among ranks; a collective that fails is a rank that is lost."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from smezo_cli.errors import UserError


class RankLost(UserError):
    """Say that another rank has ended, or cannot be reached."""


class Wire:
    """Exchange numbers among all ranks, once they have met; see :class:`smezo_cli.run.ranks.Ranks`.

    Attributes:
        rank: of this process, from 0.
        size: number of ranks.
        backend: "gloo" or "nccl".
        lost: whether a collective has failed.
    """

    rank: int
    size: int
    backend: str
    lost: bool
    _device: Any  # that holds what is sent

    def _close(self) -> None:
        from torch import distributed

        if self.lost and self.backend != "gloo":
            return  # it may wait for what is gone
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def abandon(self) -> None:
        """Close the connections, so that the others notice even if this process goes on."""
        from torch import distributed

        if not self.lost:
            self.lost = True
            distributed.destroy_process_group()

    def _add(self, numbers: Sequence[float]) -> list[float]:
        import torch
        from torch import distributed

        vector = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        # To rank 0 and back: two trips over the slowest link; a ring would take 2 (size - 1).
        parts = [torch.zeros_like(vector) for _ in self._all] if self.rank == 0 else None
        self._call(distributed.gather, vector, parts)
        if parts is not None:
            parts = [torch.stack(parts).sum(0)] * self.size
        self._call(distributed.scatter, vector, parts)
        found: list[float] = vector.tolist()
        return found

    def add_tensor(self, tensor: Any) -> Any:
        """Return the sum of float tensors over the ranks, on the CPU."""
        from torch import distributed

        tensor = tensor.to(self._device)
        self._call(distributed.all_reduce, tensor)
        return tensor.cpu()

    def gather(self, content: bytes) -> list[bytes]:
        """Return what each rank gives, by rank."""
        import torch
        from torch import distributed

        sizes = [int(n) for n in self._add([len(content) * (k == self.rank) for k in self._all])]
        parts = [torch.zeros(max(sizes), dtype=torch.uint8, device=self._device) for _ in sizes]
        mine = bytearray(content.ljust(max(sizes), b"\0"))
        self._call(
            distributed.all_gather, parts, torch.frombuffer(mine, dtype=torch.uint8).to(parts[0])
        )
        return [bytes(p.tolist())[:n] for p, n in zip(parts, sizes, strict=True)]

    @property
    def _all(self) -> range:
        return range(self.size)

    def _send(self, numbers: Sequence[int]) -> list[int]:
        import torch
        from torch import distributed

        vector = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        self._call(distributed.broadcast, vector, 0)
        found: list[int] = vector.tolist()
        return found

    def _send_bytes(self, content: bytes) -> bytes:
        import torch
        from torch import distributed

        vector = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self._device)
        self._call(distributed.broadcast, vector, 0)
        return vector.cpu().numpy().tobytes()

    def _call(self, collective: Callable[..., Any], *args: Any) -> None:
        try:
            collective(*args)
        except RuntimeError as error:
            self.lost = True
            raise RankLost(
                "another rank has ended or cannot be reached, its own message or torchrun's report "
                "says why; the same command (without if_exists=fresh) goes on, with any number of "
                f"ranks ({first_line(error)})."
            ) from error


def first_line(error: Exception) -> str:
    """Return the first line without gloo's place in its source, and without its guesses."""
    line = re.sub(r"^\[\S+:\d+\] ", "", str(error).partition("\n")[0])
    return line.partition(". This is")[0][:200]

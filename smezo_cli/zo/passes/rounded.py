"""Draw u = Q_SR(z), noise that is rounded to levels by chance: in plain torch, or by Numba.

Numba also moves float32 weights, and codes of a byte, as they are drawn for.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smezo_cli.zo import noise
from smezo_cli.zo.passes.choose import NUMBA, NoCompiler, fused_or_eager
from smezo_cli.zo.passes.eager import over_chunks
from smezo_cli.zo.rounding import to_levels

Pair = tuple[Tensor, Tensor]

# Pairs of a thread below which another one costs more than it saves.
_SHARE = 1 << 14


class Stream(NamedTuple):
    """Hold what one term of a move draws of one tensor: c Q_SR(z).

    Attributes:
        z: the stream of z, Gaussian.
        chance: the stream that rounds it.
        coefficient: c.
    """

    z: tuple[int, int]
    chance: tuple[int, int]
    coefficient: float


class EagerDraws:
    """Draws in plain torch, on any device.

    Args:
        step: between two levels.
    """

    name = "eager"

    def __init__(self, step: float) -> None:
        self.step, self.inverse = step, 1 / step

    def pair(self, start: int, stop: int, device: torch.device, stream: Stream) -> Pair:
        """Return c u of both elements of the pairs from ``start`` to ``stop``: float32."""
        return self._pair(torch.arange(start, stop, device=device), stream)

    def at(self, index: Tensor, numel: int, stream: Stream) -> Tensor:
        """Return c u at flat positions (int64, any shape) of a tensor of ``numel`` weights."""
        counter, is_first = noise.locate(index, numel)
        first, second = self._pair(counter, stream)
        return torch.where(is_first, first, second)

    def chances(self, start: int, stop: int, device: torch.device, key: tuple[int, int]) -> Pair:
        """Return uniforms in [0, 1) of both elements of these pairs: float32."""
        return noise.uniform_pair(torch.arange(start, stop, device=device), key)

    def _pair(self, counter: Tensor, stream: Stream) -> Pair:
        z = noise.pair(counter, stream.z, "gaussian")
        chance = noise.uniform_pair(counter, stream.chance)
        levels = [to_levels(*both, self.inverse, self.step) for both in zip(z, chance, strict=True)]
        return levels[0] * stream.coefficient, levels[1] * stream.coefficient


class NumbaDraws(EagerDraws):
    """Make the same draws, each as one loop of machine code, on a CPU."""

    name = "numba"

    def __init__(self, step: float) -> None:
        super().__init__(step)
        from smezo_cli.zo.passes import rounded_kernels  # imports Numba, which takes a second

        self._kernels: Any = rounded_kernels  # Numba tells mypy no types

    def pair(self, start: int, stop: int, device: torch.device, stream: Stream) -> Pair:
        """See :class:`EagerDraws`."""
        both = torch.empty(2, stop - start)
        self._kernels.pairs(*both.numpy(), start, *stream, self.inverse, self.step)
        return both[0], both[1]

    def at(self, index: Tensor, numel: int, stream: Stream) -> Tensor:
        """See :class:`EagerDraws`."""
        out, place = torch.empty(index.numel()), index.reshape(-1).numpy()
        self._kernels.picked(out.numpy(), place, numel, *stream, self.inverse, self.step)
        return out.view(index.shape)

    def chances(self, start: int, stop: int, device: torch.device, key: tuple[int, int]) -> Pair:
        """See :class:`EagerDraws`."""
        both = torch.empty(2, stop - start)
        self._kernels.chances(*both.numpy(), start, key)
        return both[0], both[1]

    def move(self, weight: Tensor, outs: Sequence[Tensor], stream: Stream) -> None:
        """Write weights moved by c u, and to a second out those moved by its negative.

        Args:
            weight: float32, flat.
            outs: one or two like it; the first may be the weight, if it is alone.
            stream: gives c u.
        """
        pairs, plain = weight.numel() // 2, (*stream, self.inverse, self.step)
        is_same = outs[0].data_ptr() == weight.data_ptr()
        written = outs if not is_same else []
        loop = (self._kernels.in_place, self._kernels.away, self._kernels.both_ways)[len(written)]
        arrays = [x.numpy() for x in (weight, *written)]

        def one(part: slice) -> None:
            there = slice(pairs + part.start, pairs + part.stop)
            loop(*(x[of] for x in arrays for of in (part, there)), part.start, *plain)

        _in_threads(pairs, 1, one)
        if weight.numel() % 2:  # the first of a pair of its own
            u = self.pair(pairs, pairs + 1, weight.device, stream)[0]
            last = weight[-1:].clone()
            for out, moved in zip(outs, (last + u, last - u), strict=False):
                out[-1:] = moved

    def write_codes(
        self, codes: Tensor, scales: Tensor, group: int, outs: Sequence[Tensor], stream: Stream
    ) -> None:
        """Do as :meth:`move` for weights codes x scales.

        Args:
            codes: int8 (rows, columns), of evenly many rows.
            scales: float32 (rows, groups).
            group: columns that share a scale.
            outs: float32, flat.
            stream: as there.
        """
        loop = (self._kernels.codes_away, self._kernels.codes_both_ways)[len(outs) - 1]
        arrays = codes.numpy(), scales.numpy(), group, *(x.view(codes.shape).numpy() for x in outs)
        self._by_rows(loop, codes, arrays, stream)

    def move_codes(
        self,
        codes: Tensor,
        scales: Tensor,
        group: int,
        largest: int,
        stream: Stream,
        key: tuple[int, int],
    ) -> None:
        """Move codes by c u over the scales, rounded by chance; they stay at the ends of the range.

        Args:
            codes: as for :meth:`write_codes`.
            scales: likewise.
            group: likewise.
            largest: code.
            stream: gives c u.
            key: the stream of the chance.
        """
        arrays = codes.numpy(), scales.numpy(), group, largest, key
        self._by_rows(self._kernels.codes_in_place, codes, arrays, stream)

    def _by_rows(
        self, loop: Callable[..., None], codes: Tensor, arrays: tuple[Any, ...], stream: Stream
    ) -> None:
        plain = *stream, self.inverse, self.step

        def one(rows: slice) -> None:
            loop(*arrays, rows.start, rows.stop, *plain)

        _in_threads(codes.shape[0] // 2, codes.shape[1], one)


def _in_threads(length: int, size: int, one: Callable[[slice], None]) -> None:
    """Call ``one`` for parts of ``length``, one a thread; ``size`` says how many pairs are in 1."""
    share = -(-length // torch.get_num_threads())
    over_chunks(length, torch.device("cpu"), one, max(share, _SHARE // size, 1))


def choose_draws(step: float, backend: str, device: torch.device) -> tuple[EagerDraws, str]:
    """Return Numba's draws on a CPU where they work and are asked for, else eager ones.

    Args:
        step: between two levels.
        backend: "auto", "compiled" or "eager".
        device: where the weights lie.

    Returns:
        The draws, and why they are eager ("" when that was asked for, or they are Numba's).

    Raises:
        NoCompiler: "compiled" was asked for and does not work here.
    """
    if device.type == "cpu":
        return fused_or_eager(
            backend, NUMBA, lambda: NumbaDraws(step), lambda: EagerDraws(step), _try_out
        )
    why = "draws that are rounded to levels are compiled for a CPU alone"
    if backend == "compiled":
        raise NoCompiler(why)
    return EagerDraws(step), "" if backend == "eager" else why


def _try_out(draws: EagerDraws, eager: EagerDraws) -> None:
    """Draw some pairs by both.

    Raises:
        RuntimeError: the bits are not the eager ones.
    """
    ask = 1, 1250, torch.device("cpu"), Stream((1, 2), (3, 4), 0.5)
    if not all(map(torch.equal, draws.pair(*ask), eager.pair(*ask))):
        raise RuntimeError(f"the bits of {draws.name} draws are not the eager ones")


def over_halves(
    numel: int, device: torch.device, one: Callable[[slice, slice, int, int], None]
) -> None:
    """Call ``one(first, second, start, stop)`` for chunks of the pairs of a flat tensor.

    ``first`` and ``second`` are where the pairs from ``start`` to ``stop`` lie. An odd last entry
    comes as both: read both before writing, and write ``second`` first.
    """
    pairs = numel // 2

    def part(of: slice) -> None:
        one(of, slice(pairs + of.start, pairs + of.stop), of.start, of.stop)

    over_chunks(pairs, device, part)
    if numel % 2:
        last = slice(2 * pairs, numel)
        one(last, last, pairs, pairs + 1)

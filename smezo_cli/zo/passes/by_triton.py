"""Make passes by hand-written Triton kernels on a CUDA (or ROCm) device."""

from typing import Any

import torch
from torch import Tensor

from smezo_cli.zo.passes.draw import Draw, Rule
from smezo_cli.zo.passes.eager import EagerPasses, Fold, Use, of_draws, over_chunks
from smezo_cli.zo.rounding import ROUNDINGS

# Pairs (or picked entries) that a program takes: eight for each of its 128 threads.
_BLOCK = 1024


class TritonPasses:
    """Make the passes, each as one kernel; tensors that are elsewhere take the eager passes."""

    name = "triton"
    reads_numbers = False
    block = _BLOCK

    def __init__(self, rule: Rule) -> None:
        from smezo_cli.zo.passes import triton_kernels  # imports Triton, which takes a second

        self.rule = rule
        self._eager = EagerPasses(rule)
        self._kernels: Any = triton_kernels  # Triton tells mypy no types

    def move(self, weight: Tensor, out: Tensor, draw: Draw) -> None:
        """See :meth:`EagerPasses.move`."""
        if not self._is_ready(weight, out):
            self._eager.move(weight, out, draw)
            return
        numel = weight.numel()
        self._launch(
            self._kernels.move,
            weight,
            -(-numel // 2),
            _as_read(weight),
            _as_read(out),
            numel // 2,
            *self._numbers(draw, draw.round_key),
            is_odd=numel % 2,
            **self._rules(draw),
            rounded=self._rounding(out.dtype),
        )

    def move_both(self, weight: Tensor, plus: Tensor, minus: Tensor, draw: Draw) -> None:
        """See :meth:`EagerPasses.move_both`."""
        if not self._is_ready(weight, plus, minus):
            self._eager.move_both(weight, plus, minus, draw)
            return
        numel = weight.numel()
        self._launch(
            self._kernels.move_both,
            weight,
            -(-numel // 2),
            *map(_as_read, (weight, plus, minus)),
            numel // 2,
            *self._numbers(draw),
            is_odd=numel % 2,
            **self._rules(draw),
        )

    def move_at(self, weight: Tensor, index: Tensor, numel: int, draw: Draw) -> Tensor:
        """See :func:`smezo_cli.zo.passes.eager.move_at`."""
        picked, place = weight.contiguous(), index.contiguous()
        if not self._is_ready(picked):
            return self._eager.move_at(weight, index, numel, draw)
        out = torch.empty_like(picked)
        self._launch(
            self._kernels.move_at,
            weight,
            weight.numel(),
            _as_read(picked),
            _as_read(out),
            place,
            weight.numel(),
            numel,
            *self._numbers(draw, draw.round_key),
            **self._rules(draw),
            rounded=self._rounding(out.dtype),
        )
        return out

    def along(self, weight: Tensor, draw: Draw, use: Use, fold: Fold | None = None) -> None:
        """See :meth:`EagerPasses.along`."""
        if not self._is_ready(weight):
            self._eager.along(weight, draw, use, fold)
            return
        pairs, device, is_stochastic = weight.numel() // 2, weight.device, self.rule.stochastic

        def drawn(part: slice, bits: Tensor, draw: Draw) -> Tensor:
            count = part.stop - part.start
            both = torch.empty(2, count, device=device)
            self._launch(
                self._kernels.along,
                weight,
                count,
                *both,
                *bits,
                part.start,
                count,
                draw.keys.contiguous(),
                draw.coefficients.contiguous(),
                draw.round_key,
                len(draw.keys),
                draws=self._kernels.PAIRS[self.rule.noise],
                is_stochastic=is_stochastic,
            )
            return both

        def one(part: slice) -> None:
            size = part.stop - part.start if is_stochastic else 0
            bits = torch.empty(2, size, dtype=torch.int32, device=device)
            both = of_draws(draw, lambda d: drawn(part, bits, d), fold)
            chance = tuple(bits) if is_stochastic else (None, None)
            use(part if part.start < pairs else slice(2 * pairs, None), both[0], chance[0])
            if part.start < pairs:
                use(slice(pairs + part.start, pairs + part.stop), both[1], chance[1])

        over_chunks(pairs, device, one)
        if weight.numel() % 2:  # the last entry is the first of a pair of its own
            one(slice(pairs, pairs + 1))

    def _is_ready(self, *tensors: Tensor) -> bool:
        """Say whether kernels read and write these tensors."""
        there = tensors[0].is_cuda or self._kernels.IS_INTERPRETED
        return there and all(x.is_contiguous() for x in tensors) and tensors[0].numel() > 0

    def _launch(self, kernel: Any, where: Tensor, count: int, *given: Any, **fixed: Any) -> None:
        """Run a kernel for so many counters, on the device of a tensor."""
        with torch.cuda.device_of(where):  # type: ignore[no-untyped-call]  # a no-op on a CPU
            grid = (-(-count // self.block),)
            kernel[grid](*given, **fixed, size=self.block, **self._kernels.OPTIONS)

    @staticmethod
    def _numbers(draw: Draw, *round_key: Tensor) -> tuple[Tensor | int, ...]:
        """Return what a kernel reads of a draw; where there is no decay, any number is at hand."""
        keys, a = draw.keys.contiguous(), draw.coefficients.contiguous()
        decay = draw.h if draw.decay is None else draw.decay
        return keys, a, draw.mask_key, *round_key, draw.h, decay, len(keys)

    def _rules(self, draw: Draw) -> dict[str, Any]:
        """Return what is compiled into a kernel."""
        return {
            "draws": self._kernels.PAIRS[self.rule.noise],
            "is_active": self._kernels.RULES[self.rule.mask],
            "by_chance": self.rule.mask == "random",
            "decays": draw.decay is not None,
        }

    def _rounding(self, dtype: torch.dtype) -> Any:
        stochastic = self.rule.stochastic and dtype in ROUNDINGS
        return self._kernels.ROUNDINGS[dtype if stochastic else None]


def _as_read(tensor: Tensor) -> Tensor:
    """Return the tensor as kernels take it: of bfloat16 the patterns."""
    tensor = tensor.detach()
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor

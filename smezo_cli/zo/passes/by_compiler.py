"""Compile passes by torch.compile: C++ on a CPU, Triton on a GPU."""

import itertools
import os
import types
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from smezo_cli.zo import dynamo
from smezo_cli.zo.passes.draw import Draw, Rule
from smezo_cli.zo.passes.eager import (
    EagerPasses,
    Fold,
    Use,
    move_at,
    move_pairs,
    move_pairs_both,
    of_draws,
    over_chunks,
    round_bits,
    sum_of_draws,
)

_numbers = itertools.count()  # of what was compiled


class NoCompiler(RuntimeError):
    """Say that fused passes were asked for and cannot be had."""


class CompiledPasses:
    """Make the passes, each as one fused loop (C++ on a CPU, Triton on a GPU)."""

    name = "compiled"
    reads_numbers = False

    def __init__(self, rule: Rule) -> None:
        # Triton contracts a * b + c by default, which eager code does not.
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")
        self.rule = rule
        self._eager = EagerPasses(rule)

        def whole(a: Tensor, b: Tensor, out_a: Tensor, out_b: Tensor, *draw: Tensor | None) -> None:
            counter = torch.arange(a.shape[0], dtype=torch.int64, device=a.device)
            move_pairs(a, b, out_a, out_b, counter, rule, Draw(*draw))  # type: ignore[arg-type]  # spread

        def both(a: Tensor, b: Tensor, *rest: Tensor | None) -> None:
            counter = torch.arange(a.shape[0], dtype=torch.int64, device=a.device)
            p, p_, m, m_, *draw = rest
            plus, minus = (p, p_), (m, m_)
            move_pairs_both(a, b, plus, minus, counter, rule, Draw(*draw))  # type: ignore[arg-type]  # spread

        def picked(weight: Tensor, index: Tensor, numel: Tensor, *draw: Tensor | None) -> Tensor:
            return move_at(weight, index, numel, rule, Draw(*draw))  # type: ignore[arg-type]  # spread

        self._whole = _compile(whole)  # type: ignore[arg-type]  # a closure is a FunctionType
        self._both = _compile(both)  # type: ignore[arg-type]  # likewise
        self._picked = _compile(picked)  # type: ignore[arg-type]  # likewise

        def directions(counter: Tensor, *draw: Tensor | None) -> Tensor:
            return torch.stack(sum_of_draws(counter, rule, Draw(*draw)))  # type: ignore[arg-type]  # spread

        self._directions = _compile(directions)  # type: ignore[arg-type]  # likewise

    def move(self, weight: Tensor, out: Tensor, draw: Draw) -> None:
        """See :meth:`EagerPasses.move`."""
        pairs = weight.numel() // 2
        if pairs < 64:  # too short for a loop of its own shape
            self._eager.move(weight, out, draw)
            return
        self._whole(*_halves(weight, pairs), *_halves(out, pairs), *draw)
        if weight.numel() % 2:
            last, counter = slice(2 * pairs, None), torch.tensor([pairs], device=weight.device)
            move_pairs(weight[last], weight[last], out[last], out[last], counter, self.rule, draw)

    def move_both(self, weight: Tensor, plus: Tensor, minus: Tensor, draw: Draw) -> None:
        """See :meth:`EagerPasses.move_both`."""
        pairs = weight.numel() // 2
        if pairs < 64:
            self._eager.move_both(weight, plus, minus, draw)
            return
        self._both(*(half for x in (weight, plus, minus) for half in _halves(x, pairs)), *draw)
        if weight.numel() % 2:
            last, counter = slice(2 * pairs, None), torch.tensor([pairs], device=weight.device)
            outs = (plus[last], plus[last]), (minus[last], minus[last])
            move_pairs_both(weight[last], weight[last], *outs, counter, self.rule, draw)

    def along(self, weight: Tensor, draw: Draw, use: "Use", fold: "Fold | None" = None) -> None:
        """See :meth:`EagerPasses.along`."""
        pairs = weight.numel() // 2
        if pairs < 64:
            self._eager.along(weight, draw, use, fold)
            return

        def one(part: slice) -> None:
            counter = torch.arange(part.start, part.stop, device=weight.device)
            first, second = of_draws(draw, lambda d: self._directions(counter, *d), fold)
            bits = round_bits(counter, self.rule, draw)
            use(part, first, bits[0])
            use(slice(pairs + part.start, pairs + part.stop), second, bits[1])

        over_chunks(pairs, weight.device, one)
        if weight.numel() % 2:
            counter = torch.tensor([pairs], device=weight.device)
            bits = round_bits(counter, self.rule, draw)
            last = of_draws(draw, lambda d: sum_of_draws(counter, self.rule, d), fold)[0]
            use(slice(2 * pairs, None), last, bits[0])

    def move_at(self, weight: Tensor, index: Tensor, numel: int, draw: Draw) -> Tensor:
        """See :func:`move_at`."""
        if weight.numel() < 128:
            return move_at(weight, index, numel, self.rule, draw)
        size = torch.tensor(numel, dtype=torch.int64, device=weight.device)
        moved: Tensor = self._picked(weight.reshape(-1), index.reshape(-1), size, *draw)
        return moved.view(weight.shape)


def _halves(flat: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Return two views that a compiler takes for separate storages, so that both may be written."""
    flat = flat.detach()
    with torch.cuda.device_of(flat):  # type: ignore[no-untyped-call]  # a no-op on a CPU
        return from_dlpack(flat[:pairs]), from_dlpack(flat[pairs : 2 * pairs])


def _compile(function: types.FunctionType) -> Callable[..., Tensor]:
    """Use ``torch.compile`` for each device that the first argument comes from."""
    made: dict[torch.device, Callable[..., Tensor]] = {}

    def compiled(*tensors: Tensor | None) -> Tensor:
        assert tensors[0] is not None
        device = tensors[0].device
        with dynamo.allowed():
            if device not in made:
                made[device] = _compile_alone(function)
            return made[device](*tensors)

    return compiled


def _compile_alone(function: types.FunctionType) -> Callable[..., Tensor]:
    """Compile under a code object of its own: recompilations are limited per object."""
    own = types.FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}"),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    compiled: Callable[..., Tensor] = torch.compile(own, dynamic=True, fullgraph=True)
    return compiled


def compiler_settings() -> str:
    """Say which settings of the compilers are in the environment: one may be why they fail."""
    prefixes = ("NUMBA_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE_")
    # The folder of what is compiled is torch's own to set, and turns nothing off.
    names = sorted(
        name for name in os.environ if name.startswith(prefixes) and not name.endswith("_CACHE_DIR")
    )
    return f" (set in the environment: {', '.join(names)})" if names else ""

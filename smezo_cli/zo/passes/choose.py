"""Choose what makes a pass over a tensor (draw, mask, move), for probes and updates alike.

    moved = where(mask(w), w + sum_q a_q z_q - d w, w)

computed in float32, rounded to the output's dtype, with a term for each z_q of a move. Of most
methods a probe has one, a = +-eps and d = 0; an update has -lr times the coefficients of the
gradient, and d = lr * weight_decay. On a CPU Numba compiles the function to one loop, on a CUDA
device it is a kernel by Triton; without them it runs in chunks that fit the cache. All give the
same bits.
"""

import os
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from smezo_cli.zo.passes.by_index import PassesByIndex, Values
from smezo_cli.zo.passes.by_numba import NumbaPasses
from smezo_cli.zo.passes.by_triton import TritonPasses
from smezo_cli.zo.passes.draw import Draw, Rule
from smezo_cli.zo.passes.eager import EagerPasses
from smezo_cli.zo.passes.in_periods import Period, PeriodicPasses

Passes = EagerPasses | NumbaPasses | TritonPasses

Fused = TypeVar("Fused")
Eager = TypeVar("Eager")


class NoCompiler(RuntimeError):
    """Say that fused passes were asked for and cannot be had."""


class Compiler(NamedTuple):
    """Name a compiler, and the environment variable that turns it off."""

    name: str
    switch: str


NUMBA, TRITON = Compiler("Numba", "NUMBA_DISABLE_JIT"), Compiler("Triton", "TRITON_INTERPRET")


class _Way(NamedTuple):
    """Describe what fuses the passes on a kind of device.

    Attributes:
        compiler: that does it.
        kind: makes the passes of a rule.
        dtypes: of weights that are moved to try it out.
    """

    compiler: Compiler
    kind: Callable[[Rule], Passes]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)


def choose_passes(rule: Rule, backend: str, device: torch.device) -> tuple[Passes, str]:
    """Return fused passes where they work, else eager ones.

    They are Numba's on a CPU and Triton's elsewhere.

    Args:
        rule: what is fixed for the run.
        backend: "auto", "compiled" or "eager".
        device: where the weights lie.

    Returns:
        The passes, and why they are eager ("" when that was asked for or they are fused).

    Raises:
        NoCompiler: "compiled" was asked for and does not work here.
    """
    way = _Way(NUMBA, NumbaPasses)
    if device.type != "cpu":
        way = _Way(TRITON, TritonPasses, (torch.float32, torch.bfloat16, torch.float16))
    return _if_it_works(rule, backend, device, way, EagerPasses)


def choose_looked_up(
    rule: Rule, values: Values, period: Period | None, backend: str, device: torch.device
) -> tuple[Passes, str]:
    """Do as :func:`choose_passes` for noise that is looked up, not computed.

    Such passes are fused on a CPU, by Numba, where the noise comes again after a period.

    Args:
        rule: what is fixed for the run; its noise is not read.
        values: gives the noise at single places.
        period: gives a period of it; None: it has none that is short enough.
        backend: as there.
        device: as there.

    Raises:
        NoCompiler: "compiled" was asked for and Numba does not work here.
    """

    def eager(rule: Rule) -> PassesByIndex:
        return PassesByIndex(rule, values)

    if period is None or device.type != "cpu":
        why = "numbers of a pool are looked up, not computed" if backend == "compiled" else ""
        return eager(rule), why
    way = _Way(NUMBA, lambda rule: PeriodicPasses(rule, values, period))
    return _if_it_works(rule, backend, device, way, eager)


def _if_it_works(
    rule: Rule,
    backend: str,
    device: torch.device,
    way: _Way,
    eager: Callable[[Rule], EagerPasses],
) -> tuple[Passes, str]:
    def try_out(fused: Passes, plain: EagerPasses) -> None:
        for dtype in way.dtypes:
            _try_out(fused, plain, device, dtype)

    return fused_or_eager(
        backend, way.compiler, lambda: way.kind(rule), lambda: eager(rule), try_out
    )


def fused_or_eager(
    backend: str,
    compiler: Compiler,
    fused: Callable[[], Fused],
    eager: Callable[[], Eager],
    try_out: Callable[[Fused, Eager], None],
) -> tuple[Fused | Eager, str]:
    """Return what a compiler fuses where that works here, else what is eager.

    Args:
        backend: "auto", "compiled" or "eager".
        compiler: of the fused ones.
        fused: makes them.
        eager: makes the eager ones.
        try_out: raises an error unless the fused ones give the bits of the eager ones.

    Returns:
        Them, and why they are eager ("" when that was asked for or they are fused).

    Raises:
        NoCompiler: "compiled" was asked for and does not work here.
    """
    if backend == "eager":
        return eager(), ""
    cause: Exception | None = None
    if (given := os.environ.get(compiler.switch, "0")) not in ("", "0"):
        why = f"the compiler is off as long as {compiler.switch}={given} is set"
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = fused()
                try_out(made, eager())
            return made, ""
        except Exception as error:  # whatever a missing or broken tool chain raises
            cause = error
            why = f"{compiler.name} does not work here: {_first_line(error)}{_settings()}"
    if backend == "compiled":
        raise NoCompiler(why) from cause
    return eager(), why


def _try_out(passes: Passes, eager: EagerPasses, device: torch.device, dtype: torch.dtype) -> None:
    """Move some weights, an odd number and more than a block of them.

    Raises:
        RuntimeError: the bits are not those of eager passes.
    """
    sample = torch.linspace(-1.0, 1.0, 2499, device=device).to(dtype)
    key = torch.tensor([[1, 2], [3, 4], [5, 6]], device=device)
    number = torch.tensor(0.5, device=device)
    draw = Draw(key[:1], key[1], key[2], number, number[None])
    found, wanted = torch.empty_like(sample), torch.empty_like(sample)
    passes.move(sample, found, draw)
    eager.move(sample, wanted, draw)
    if not torch.equal(found, wanted):
        raise RuntimeError(f"the bits of {passes.name} passes in {dtype} are not the eager ones")


def _settings() -> str:
    """Say which settings of Numba and Triton are in the environment: one may be why they fail."""
    prefixes = ("NUMBA_", "TRITON_")
    names = sorted(
        name for name in os.environ if name.startswith(prefixes) and not name.endswith("_CACHE_DIR")
    )
    return f" (set in the environment: {', '.join(names)})" if names else ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


# Weights times steps from which Numba's start, some 4 s, is repaid (eager: some 1e8 a second).
WORTH_IT = 5e8

"""Choose what makes a pass over a tensor (draw, mask, move), for probes and updates alike.

    moved = where(mask(w), w + sum_q a_q z_q - d w, w)

computed in float32, rounded to the output's dtype. A probe has one query, a = +-eps and d = 0; an
update has a_q = -lr * projected_grad_q / q and d = lr * weight_decay. On a CPU Numba compiles the
function to one loop, on a CUDA device it is a kernel by Triton, elsewhere ``torch.compile`` fuses
it; without any of them it runs in chunks that fit the cache. All give the same bits.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from smezo_cli.zo.passes.by_compiler import CompiledPasses, NoCompiler, compiler_settings
from smezo_cli.zo.passes.by_index import PassesByIndex, Values
from smezo_cli.zo.passes.by_numba import NumbaPasses
from smezo_cli.zo.passes.by_triton import TritonPasses
from smezo_cli.zo.passes.draw import Draw, Rule
from smezo_cli.zo.passes.eager import EagerPasses
from smezo_cli.zo.passes.in_periods import Period, PeriodicPasses

Passes = EagerPasses | CompiledPasses | NumbaPasses | TritonPasses


class _Way(NamedTuple):
    """Describe one way to fuse the passes.

    Attributes:
        kind: makes the passes of a rule.
        missing: what is said before the error that it raised.
        switches: environment variables that turn it off.
        dtypes: of weights that are moved to try it out.
    """

    kind: Callable[[Rule], Passes]
    missing: str
    switches: Sequence[str]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)


def _by_numba(kind: Callable[[Rule], Passes]) -> _Way:
    return _Way(kind, "Numba does not work here", ("NUMBA_DISABLE_JIT",))


def _ways(device: torch.device) -> list[_Way]:
    """Return the ways to fuse passes on a device, the best one first."""
    if device.type == "cpu":
        return [_by_numba(NumbaPasses)]
    missing = "no working compiler (g++ and Python's headers are needed)"
    switches = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
    ways = [_Way(CompiledPasses, missing, switches)]
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        every = (torch.float32, torch.bfloat16, torch.float16)
        missing = "Triton does not work here"
        ways.insert(0, _Way(TritonPasses, missing, ("TRITON_INTERPRET",), every))
    return ways


def choose_passes(rule: Rule, backend: str, device: torch.device) -> tuple[Passes, str]:
    """Return fused passes where they work, else eager ones.

    They are Numba's on a CPU, Triton's on a CUDA device that has it and torch.compile's elsewhere.

    Args:
        rule: what is fixed for the run.
        backend: "auto", "compiled" or "eager".
        device: where the weights lie.

    Returns:
        The passes, and why they are eager ("" when that was asked for or they are fused).

    Raises:
        NoCompiler: "compiled" was asked for and does not work here.
    """
    return _first_that_works(rule, backend, device, _ways(device), EagerPasses)


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
    way = _by_numba(lambda rule: PeriodicPasses(rule, values, period))
    return _first_that_works(rule, backend, device, [way], eager)


def _first_that_works(
    rule: Rule,
    backend: str,
    device: torch.device,
    ways: Sequence[_Way],
    eager: Callable[[Rule], EagerPasses],
) -> tuple[Passes, str]:
    if backend == "eager":
        return eager(rule), ""
    reasons: list[str] = []
    cause: Exception | None = None
    for way in ways:
        off = [name for name in way.switches if os.environ.get(name, "0") not in ("", "0")]
        if off:
            reasons.append(f"the compiler is off as long as {off[0]}={os.environ[off[0]]} is set")
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                passes = way.kind(rule)
                for dtype in way.dtypes:
                    _try_out(passes, eager(rule), device, dtype)
            return passes, ""
        except Exception as error:  # whatever a missing or broken tool chain raises
            cause = error
            reasons.append(f"{way.missing}: {_first_line(error)}{compiler_settings()}")
    why = "; ".join(reasons)
    if backend == "compiled":
        raise NoCompiler(why) from cause
    return eager(rule), why


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


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


# Weights times steps from which Numba's start, some 4 s, is repaid (eager: some 1e8 a second).
WORTH_IT = 5e8

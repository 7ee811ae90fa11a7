"""One pass over a tensor: draw, mask, move. The same function serves the probe and the update.

    moved = where(mask(w), w + sum_q a_q z_q - d w, w)

computed in float32, rounded to the output's dtype. A probe has one query, a = +-eps and d = 0; an
update has a_q = -lr * projected_grad_q / q and d = lr * weight_decay. On a CPU Numba compiles the
function to one loop, elsewhere ``torch.compile`` fuses it; without either it runs in chunks that
fit the cache. All give the same bits.
"""

import os
import warnings

import torch

from smezo_cli.zo.passes.by_compiler import CompiledPasses, NoCompiler, compiler_settings
from smezo_cli.zo.passes.by_numba import NumbaPasses
from smezo_cli.zo.passes.draw import Draw, Rule
from smezo_cli.zo.passes.eager import EagerPasses

Passes = EagerPasses | CompiledPasses | NumbaPasses


def choose_passes(rule: Rule, backend: str, device: torch.device) -> tuple[Passes, str]:
    """Return fused passes where they work (Numba on a CPU, else torch.compile), or eager ones.

    Args:
        rule: what is fixed for the run.
        backend: "auto", "compiled" or "eager".
        device: where the weights lie.

    Returns:
        The passes, and why they are eager ("" when that was asked for or they are fused).

    Raises:
        NoCompiler: "compiled" was asked for and does not work here.
    """
    if backend == "eager":
        return EagerPasses(rule), ""
    kind: type[Passes] = CompiledPasses
    missing = "no working compiler (g++ and Python's headers are needed)"
    switches: tuple[str, ...] = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
    if device.type == "cpu":
        kind, missing, switches = NumbaPasses, "Numba does not work here", ("NUMBA_DISABLE_JIT",)
    off = [name for name in switches if os.environ.get(name, "0") not in ("", "0")]
    if off:
        why = f"the compiler is off as long as {off[0]}={os.environ[off[0]]} is set"
        if backend == "compiled":
            raise NoCompiler(why)
        return EagerPasses(rule), why
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            passes = kind(rule)
            sample = torch.ones(257, device=device)
            key = torch.zeros(2, dtype=torch.int64, device=device)
            scalar = torch.zeros((), device=device)
            draw = Draw(key[None], key, key, scalar, scalar[None])
            passes.move(sample, torch.empty_like(sample), draw)
    except Exception as error:  # whatever a missing or broken tool chain raises
        why = f"{missing}: {_first_line(error)}{compiler_settings()}"
        if backend == "compiled":
            raise NoCompiler(why) from error
        return EagerPasses(rule), why
    return passes, ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


# Weights times steps from which Numba's start, some 4 s, is repaid (eager: some 1e8 a second).
WORTH_IT = 5e8

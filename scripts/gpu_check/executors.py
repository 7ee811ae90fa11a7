"""Compare losses and seconds of LOZO's step by several executors."""

from collections.abc import Iterator
from functools import partial

import torch

from gpu_check.models import build, free_bytes, layers_that_fit, loss_of
from gpu_check.rows import Place, Row, row, skipped
from gpu_check.steps import BYTES_A_WEIGHT, interleaved
from smezo_cli.methods.lozo import LOZO

EXECUTORS = ("sequential", "side_path", "batched")
LR, EPS = 1e-12, 1e-2  # points far enough apart that float32 would show one that is not moved
ROWS, TOKENS, QUERIES, ROUNDS = 4, 64, 2, 5


def check(place: Place) -> Iterator[Row]:
    """Yield rows for float32 and bfloat16; losses agree as the library itself asks (zo/executors).

    That is to 1e-5 of their size in float32, to four times the precision of a narrower dtype.
    """
    names = {torch.float32: "smollm2-360m", torch.bfloat16: "opt-1.3b"}
    if place.tiny:
        names = {torch.float32: "tiny-llama", torch.bfloat16: "tiny-opt"}
    for number, (dtype, name) in enumerate(names.items()):
        what = f"executors: lozo, {name}, {str(dtype).removeprefix('torch.')}"
        layers = None
        if place.device.type == "cuda":
            # Weights of float32 take twice as much; LOZO itself keeps next to nothing.
            free, needed = free_bytes(place.device), dtype.itemsize / 2 * BYTES_A_WEIGHT
            layers = layers_that_fit(name, free, needed)
            if not layers:
                yield skipped(what, "too little free memory")
                continue
        yield from _compared(what, name, dtype, layers, place, place.left / (2 - number))


def _compared(
    what: str,
    name: str,
    dtype: torch.dtype,
    layers: int | None,
    place: Place,
    share: float,
) -> Iterator[Row]:
    """Yield a row for each executor other than the sequential one."""
    until = place.left - share
    model = build(name, dtype, place.device, layers)
    loss = loss_of(model, ROWS, 16 if place.tiny else TOKENS)
    methods = {
        executor: LOZO(model, lr=LR, eps=EPS, num_queries=QUERIES, executor=executor, check=False)
        for executor in EXECUTORS
    }
    # The first step of each is at the same weights: lr is too small to move any.
    found = {}
    for executor, method in methods.items():
        record = method.step(loss)
        sides = [EPS * g for g in record.projected_grad]
        found[executor] = (record.loss, sides)
    runs = {executor: partial(method.step, loss) for executor, method in methods.items()}
    seconds = interleaved(runs, 2 if place.tiny else ROUNDS, place, until)
    best = {executor: min(spent) for executor, spent in seconds.items()}
    eps = torch.finfo(dtype).eps
    mean, halves = found["sequential"]
    bound = (1e-5 if dtype == torch.float32 else 4 * eps) * max(abs(mean), 1.0)
    for executor in EXECUTORS[1:]:
        own_mean, own_halves = found[executor]
        apart = [
            abs(mean - own_mean),
            *(abs(a - b) for a, b in zip(halves, own_halves, strict=True)),
        ]
        yield row(
            f"{what}: {executor}",
            max(apart) <= bound and methods[executor].executor == executor,
            "" if max(apart) <= bound else "losses differ by more than rounding",
            loss=mean,
            differ=max(apart),
            bound=bound,
            ms=1e3 * best[executor],
            sequential_ms=1e3 * best["sequential"],
        )

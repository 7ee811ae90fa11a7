"""Check models with random weights: the self-check, the seconds of a step, and its peak memory."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gpu_check.models import build, free_bytes, layers_that_fit, loss_of, num_weights, numbers_of
from gpu_check.rows import Place, Row, row, skipped
from smezo_cli.bench.textbook import Textbook
from smezo_cli.machine.memory import PeakMemory
from smezo_cli.methods.mezo import MeZO
from smezo_cli.methods.sparse_mezo import SparseMeZO
from smezo_cli.zo.reached import Unreached

ROWS, TOKENS = 16, 64
LR, EPS, SPARSITY = 1e-12, 1e-3, 0.75  # every pass is made, and no update moves a weight
#: of weights in bfloat16, the mask of the textbook's Sparse-MeZO, and what forwards and copies take
BYTES_A_WEIGHT = 4.0
ROUNDS = 7
#: Steps that take as long as the textbook's differ by some percent from run to run.
SPREAD = 1.05
#: Activations of a second forward in turns, and rounding of the allocator; eager passes have
#: temporaries of 4M entries, some of them int64.
SCRATCH, EAGER_SCRATCH = 64 << 20, 512 << 20


def self_check(place: Place) -> Iterator[Row]:
    """Yield whether the self-check lets a Llama with shared embeddings pass, by dtype."""
    name = "tiny-llama" if place.tiny else "smollm2-360m"
    for dtype in (torch.float32, torch.bfloat16):
        model = build(name, dtype, place.device)
        yield _self_checked(name, model, 2, 16 if place.tiny else TOKENS)


def _self_checked(name: str, model: PreTrainedModel, rows: int, tokens: int) -> Row:
    dtype = str(model.dtype).removeprefix("torch.")
    what = f"self-check: {name}, {dtype}, {rows} rows"
    try:
        kinds = MeZO(model, lr=LR, eps=EPS).self_check(loss_of(model, rows, tokens))
    except (Unreached, ValueError, ArithmeticError) as error:
        return row(what, False, str(error).splitlines()[0][:300])
    return row(what, kinds > 0, weights=num_weights(model), kinds=kinds)


def check(name: str, place: Place) -> Iterator[Row]:
    """Yield the rows of one model in bfloat16: self-check, seconds of steps, memory."""
    layers, shown = numbers_of(name)["num_hidden_layers"], name
    if place.device.type == "cuda":
        free, full = free_bytes(place.device), layers
        layers = layers_that_fit(name, free, BYTES_A_WEIGHT)
        if not layers:
            yield skipped(f"steps: {name}", f"{free / 1e9:.1f} GB of free memory are too little")
            return
        if layers < full:
            shown = f"{name} of {layers} layers"
    model = build(name, torch.bfloat16, place.device, layers)
    rows, tokens = (4, 16) if place.tiny else (ROWS, TOKENS)
    loss = loss_of(model, rows, tokens)
    yield _self_checked(shown, model, rows, tokens)
    steps = Steps(model, loss)
    yield from _times(shown, steps, place)
    yield from _memory(shown, steps, place)
    yield _planned(name, layers, rows, tokens, steps, place)


class Steps:
    """The steps that are compared, on one model and one batch; none moves a weight by much.

    Args:
        model: whose weights are all trained.
        loss: of its batch.
    """

    def __init__(self, model: PreTrainedModel, loss: Callable[[], Tensor]) -> None:
        self.model, self.loss = model, loss
        common: dict[str, Any] = {"lr": LR, "eps": EPS, "check": False}
        mezo = MeZO(model, **common)
        sparse = SparseMeZO(model, sparsity=SPARSITY, **common)
        device = model.device
        h = [torch.tensor(t.h, dtype=t.parameter.dtype, device=device) for t in sparse.targets]
        self.methods = {"mezo": mezo, "sparse_mezo": sparse}
        self.textbooks = {
            "mezo": Textbook(model, lr=LR, eps=EPS),
            "sparse_mezo": Textbook(model, lr=LR, eps=EPS, thresholds=h),
        }

    @torch.inference_mode()
    def forward(self) -> float:
        """Compute the loss once."""
        return float(self.loss())

    def all_of_them(self) -> dict[str, Callable[[], object]]:
        """Return what is timed, by name; the textbook's last, for it leaves rounding behind."""
        found: dict[str, Callable[[], object]] = {"forward": self.forward}
        found |= {name: partial(method.step, self.loss) for name, method in self.methods.items()}
        for name, textbook in self.textbooks.items():
            found[f"textbook {name}"] = partial(textbook.step, self.loss)
        return found


def _times(shown: str, steps: Steps, place: Place) -> Iterator[Row]:
    """Yield the seconds of a step of each method, beside the textbook's and two forwards."""
    runs, until = steps.all_of_them(), place.left / 4
    for name, run in runs.items():
        try:
            run()  # compiles, and chooses an executor
        except torch.OutOfMemoryError:
            if not name.startswith("textbook"):
                raise
            yield skipped(f"step: {shown}", f"the {name} to compare with does not fit")
            return
    seconds = interleaved(runs, 2 if place.tiny else ROUNDS, place, until)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    for name, method in steps.methods.items():
        textbook = median[f"textbook {name}"]
        is_right = math.isfinite(median[name]) and (place.tiny or median[name] <= SPREAD * textbook)
        yield row(
            f"step: {name}, {shown}",
            is_right,
            "" if is_right else "slower than the textbook's step in place",
            ms=1e3 * median[name],
            textbook_ms=1e3 * textbook,
            two_forwards_ms=2e3 * median["forward"],
            over_textbook=median[name] / textbook,
            over_two_forwards=median[name] / (2 * median["forward"]),
            rounds=len(seconds[name]),
            executor=method.executor,
            passes=method.passes.name,
        )


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, place: Place, until: float
) -> dict[str, list[float]]:
    """Return the seconds of each, in an order that rotates from round to round; a round or more.

    No round begins once the check has no more than `until` seconds left.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for k in range(rounds):
        if k and place.left < until:
            break
        turn = k % len(names)
        for name in names[turn:] + names[:turn]:
            place.wait()
            start = time.perf_counter()
            runs[name]()
            place.wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _peak(run: Callable[[], object], place: Place) -> int:
    memory = PeakMemory(place.device)
    run()
    place.wait()
    return memory.read()


def _memory(shown: str, steps: Steps, place: Place) -> Iterator[Row]:
    """Yield the peak memory of a step beside that of a forward.

    In turns a step holds two moved copies of the largest tensor; one more is allowed for.
    """
    forward = _peak(steps.forward, place)
    largest = max(p.numel() * p.element_size() for p in steps.model.parameters())
    for name, method in steps.methods.items():
        peak = _peak(partial(method.step, steps.loss), place)
        bound = forward + 3 * largest + (EAGER_SCRATCH if method.why_eager else SCRATCH)
        is_right = peak <= bound
        yield row(
            f"memory: {name}, {shown}",
            is_right,
            "" if is_right else "more than copies of the largest tensor above inference",
            peak_GB=peak / 1e9,
            inference_GB=forward / 1e9,
            over_inference=peak / forward,
            bound_GB=bound / 1e9,
        )


def _planned(name: str, layers: int, rows: int, tokens: int, steps: Steps, place: Place) -> Row:
    """Compare the peak of a step with what `smezo plan` says of one, where that can be imported."""
    what = f"plan: {name}"
    try:
        from smezo_cli.config.compose import checked_settings
        from smezo_cli.plan.planner import plan
    except ImportError as error:
        return skipped(what, f"smezo plan needs {error.name}, which is not installed")
    words = [f"model={name}", "task=rte", "method=mezo", "dtype=bfloat16", "device=cuda"]
    words += [f"batch_size={rows}", f"model.config.num_hidden_layers={layers}"]
    found = plan(checked_settings(words, None, lambda *_: None), capacity=1 << 40, tokens=tokens)
    planned = found.step_peak
    if place.device.type != "cuda":
        return skipped(what, "it plans for a CUDA device", planned_GB=planned / 1e9)
    peak = _peak(partial(steps.methods["mezo"].step, steps.loss), place)
    # Plans of runs on a CPU were within 8% (docs/guide/memory.md).
    is_right = 0.9 * planned <= peak <= 1.1 * planned
    note = "" if is_right else "more than 10% apart"
    return row(what, is_right, note, peak_GB=peak / 1e9, planned_GB=planned / 1e9)

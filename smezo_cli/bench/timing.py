"""Time steps side by side in one process, and measure their peak memory.

Every candidate works on the same model and the same rows, all weights trained, and is timed once
a round; the order is rotated from round to round, so that none is always behind the same other.
Steps are real: the learning rate is so small that the weights stay alike, but every pass is made.
What the in-place candidates leave behind of rounding errors is not put back.
"""

import gc
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smezo_cli.bench import methods, textbook
from smezo_cli.errors import UserError
from smezo_cli.machine.memory import PeakMemory
from smezo_cli.methods.mezo import MeZO
from smezo_cli.methods.sparse_mezo import SparseMeZO
from smezo_cli.models.onednn import as_torch_has_it
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.zo.noise import stream_key
from smezo_cli.zo.passes.choose import choose_passes
from smezo_cli.zo.passes.draw import Draw, Rule
from smezo_cli.zo.selections import masks
from smezo_cli.zo.step import NonFiniteLoss, StepRecord

LR = 1e-12  # not 0: the update is made, and what it adds to a weight is below rounding
EPS = 1e-3  # of both papers
PASS_WEIGHTS = 64_000_000  # float32, of the passes that are timed alone: 256 MB read, 256 written
#: what is added to SparseMeZO's arguments, by the name of the candidate
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "sparse_mezo": {},  # executor auto, as in a run
    "sparse_mezo_sequential": {"executor": "sequential"},
    "sparse_mezo_lockstep": {"executor": "lockstep"},
    "sparse_mezo_rademacher": {"noise": "rademacher"},
    "sparse_mezo_kept_noise": {"keep_noise": True},
    "sparse_mezo_in_place": {"executor": "in_place"},
    "sparse_mezo_eager": {"backend": "eager"},
    "r_mezo": {"mask": "random"},
}
UNIT = "forward"
UNIT_LORA = "forward_lora"  # of methods that train such matrices
PASSES = ("pass_gaussian", "pass_rademacher")
NAMES = (
    UNIT,
    UNIT_LORA,
    "forward_full_logits",
    "textbook_mezo",
    "textbook_sparse_mezo",
    "textbook_mezo_our_layers",
    "textbook_sparse_mezo_our_layers",
    "mezo",
    *VARIANTS,
    *(name for name in methods.names() if name not in ("mezo", *VARIANTS)),
    *PASSES,
)
_HOW = ("sequential", "lockstep", "side_path", "batched")
#: with the candidates that run where they are asked for alone
ALL_NAMES = (*NAMES, *(f"{name}@{how}" for name in methods.names() for how in _HOW))
GROW_NAMES = (UNIT, "mezo", "sparse_mezo")

Step = Callable[[], object]


@dataclass(frozen=True)
class Candidate:
    """Hold a step to time, and what makes its passes over the weights ("": it makes none)."""

    step: Step
    passes: str = ""


def rows_of(
    ids: Sequence[int], labels: tuple[int, int], batch_size: int, length: int
) -> list[Candidates]:
    """Return rows of exactly ``length`` prompt tokens, each with two labels of one token.

    Args:
        ids: tokens of a text, ``batch_size * length`` or more; each row takes the next ones.
        labels: two tokens.
        batch_size: rows.
        length: tokens of a prompt.
    """
    rows = []
    for i in range(batch_size):
        prompt = tuple(ids[i * length : (i + 1) * length])
        assert len(prompt) == length
        full = tuple((*prompt, label) for label in labels)
        rows.append(Candidates(full, (1, 1), i % 2, truncated=False, id=str(i)))
    return rows


class Thresholds:
    """Find the thresholds of the sparse candidates once: that takes as long as some steps.

    Args:
        model: its present weights count.
        sparsity: fraction NOT perturbed.
    """

    def __init__(self, model: nn.Module, sparsity: float) -> None:
        self.model, self.sparsity = model, sparsity

    @cached_property
    def textbook(self) -> list[Tensor]:
        """See :func:`smezo_cli.bench.textbook.thresholds`."""
        return textbook.thresholds(self.model, self.sparsity)

    @cached_property
    def _known(self) -> dict[str, float]:
        found = SparseMeZO(self.model, lr=LR, eps=EPS, sparsity=self.sparsity, backend="eager")
        return {target.name: target.h for target in found.targets}

    def sparse(self, model: nn.Module, *, mask: str = "small", **arguments: Any) -> SparseMeZO:
        """Return a :class:`SparseMeZO` that is told its thresholds, where these are magnitudes."""
        if mask == "random":
            return SparseMeZO(model, mask=mask, sparsity=self.sparsity, **arguments)
        known = self._known

        class Told(SparseMeZO):
            def set_thresholds(self) -> None:
                for target in self.targets:
                    target.h = known[target.name]

        return Told(model, mask=mask, sparsity=self.sparsity, **arguments)


def makers(
    scorer: Scorer,
    batch: Sequence[Candidates],
    thresholds: Thresholds,
    pass_weights: int = PASS_WEIGHTS,
) -> dict[str, Callable[[], Candidate]]:
    """Return a function that makes each candidate, by its name in :data:`NAMES`.

    Args:
        scorer: of the model, which is on its device.
        batch: the rows of every step.
        thresholds: of the same model.
        pass_weights: float32 weights of the passes that are timed alone.
    """
    model = scorer.model
    device = next(model.parameters()).device

    def our_layers_loss() -> Tensor:
        with torch.autocast(
            device.type,
            scorer.compute_dtype,
            enabled=scorer.compute_dtype is not None,
            cache_enabled=False,
        ):
            return textbook.loss(model, batch)

    def plain_loss() -> Tensor:
        with as_torch_has_it(model):
            return our_layers_loss()

    def forward(loss: Callable[[], Tensor]) -> Candidate:
        return Candidate(torch.inference_mode()(loss))

    def textbook_step(is_sparse: bool, loss: Callable[[], Tensor] = plain_loss) -> Candidate:
        h = thresholds.textbook if is_sparse else []
        method = textbook.Textbook(model, lr=LR, eps=EPS, thresholds=h)
        return Candidate(partial(method.step, loss), "textbook")

    def ours(make: Callable[..., Any], **arguments: Any) -> Candidate:
        # A run makes the self-check once, so it is no part of a step.
        method = make(model, lr=LR, eps=EPS, check=False, **arguments)
        return Candidate(partial(method.step, partial(scorer.loss, batch)), method.passes.name)

    def of_method(name: str) -> Candidate:
        method, loss = methods.step_of(name, scorer, batch, LR, EPS)
        return Candidate(partial(method.step, loss), method.passes.name)

    def forward_lora() -> Candidate:
        own = methods.beside_lora(scorer, methods.node_of("mezo_lora")["adapter"])
        return forward(partial(own.scores, batch))

    found: dict[str, Callable[[], Candidate]] = {
        UNIT: partial(forward, partial(scorer.scores, batch)),
        UNIT_LORA: forward_lora,
        "forward_full_logits": partial(forward, plain_loss),
        "textbook_mezo": partial(textbook_step, False),
        "textbook_sparse_mezo": partial(textbook_step, True),
        "textbook_mezo_our_layers": partial(textbook_step, False, our_layers_loss),
        "textbook_sparse_mezo_our_layers": partial(textbook_step, True, our_layers_loss),
        "mezo": partial(ours, MeZO),
    }
    for name, arguments in VARIANTS.items():
        found[name] = partial(ours, thresholds.sparse, **arguments)
    for name in ALL_NAMES:
        if name.partition("@")[0] in methods.names() and name not in found:
            found[name] = partial(of_method, name)
    for name in PASSES:
        noise = name.removeprefix("pass_")
        found[name] = partial(_pass, noise, thresholds.sparsity, pass_weights, device)
    return found


def _pass(noise: str, sparsity: float, weights: int, device: torch.device) -> Candidate:
    """Return the masked pass of a probe, from weights to scratch of the same length."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(weights, device=device, generator=generator)
    out = torch.empty_like(weight)
    key = torch.tensor(stream_key(0, "bench"), dtype=torch.int64, device=device)
    h = torch.tensor(masks.threshold(weight, "small", sparsity), device=device)
    draw = Draw(key[None], key, key, h, torch.tensor([EPS], device=device))
    passes, _ = choose_passes(Rule("small", noise), "auto", device)
    return Candidate(torch.no_grad()(partial(passes.move, weight, out, draw)), passes.name)


def interleave(
    steps: Mapping[str, Step],
    rounds: int,
    *,
    wait: Callable[[], object] = lambda: None,
    tick: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Return the seconds of every step by round; a round runs each once, in an order that rotates.

    Ctrl-C ends it: the rounds that are whole are returned.

    Args:
        steps: by name, warm already.
        rounds: how often each is timed.
        wait: returns when the device has done all that it was given.
        tick: is told each step that is done.

    Raises:
        KeyboardInterrupt: no round is whole.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    collects, whole = gc.isenabled(), 0
    try:
        for whole in range(rounds):
            gc.collect()  # now, rather than during a step
            gc.disable()
            turn = whole % len(names)
            for name in names[turn:] + names[:turn]:
                wait()
                start = time.perf_counter()
                steps[name]()
                wait()
                seconds[name].append(time.perf_counter() - start)
                tick(name)
            if collects:
                gc.enable()
    except KeyboardInterrupt:
        if whole == 0:
            raise
        return {name: values[:whole] for name, values in seconds.items()}
    finally:
        if collects:
            gc.enable()
    return seconds


def summary(
    seconds: Mapping[str, Sequence[float]],
    forwards: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return medians, quartiles and ratios of rounds: ``{"median_seconds": {name: ...}, ...}``.

    ``ratio_to_two_forwards`` is the ratio of two medians; a pass alone has none.
    ``ratio_to_its_forwards`` is the median of a step's seconds over its number of forwards, in
    forwards: 1 would be a step that costs its forwards alone.

    Args:
        seconds: by name, of every round.
        forwards: by name, that each of these steps made.
    """
    quartiles = {
        name: [float(q) for q in np.percentile(values, (25, 50, 75))]
        for name, values in seconds.items()
    }
    return {
        "median_seconds": {name: q[1] for name, q in quartiles.items()},
        "iqr_seconds": {name: q[2] - q[0] for name, q in quartiles.items()},
        "ratio_to_two_forwards": {
            name: q[1] / (2 * quartiles[UNIT][1])
            for name, q in quartiles.items()
            if name not in PASSES
        },
        "ratio_to_its_forwards": {
            name: float(np.median(np.divide(seconds[name], made))) / quartiles[unit_of(name)][1]
            for name, made in (forwards or {}).items()
        },
        "rounds": {name: list(values) for name, values in seconds.items()},
    }


def unit_of(name: str) -> str:
    """Return which forward a candidate's cost is compared with."""
    method = name.partition("@")[0]
    return UNIT_LORA if method in methods.names() and methods.on_lora(method) else UNIT


class Bench:
    """Measure the time and the memory of candidates on one model.

    Args:
        scorer: of the model, which is on its device.
        batch: rows of every step, from :func:`rows_of`.
        names: of :data:`NAMES`; the unit is always among them.
        rounds: how often each is timed.
        sparsity: fraction NOT perturbed by the sparse ones.
        pass_weights: float32 weights of the passes that are timed alone.
        tick: is told what was done, by its name.
    """

    def __init__(
        self,
        scorer: Scorer,
        batch: Sequence[Candidates],
        names: Iterable[str] = NAMES,
        *,
        rounds: int = 7,
        sparsity: float = 0.75,
        pass_weights: int = PASS_WEIGHTS,
        tick: Callable[[str], object] = lambda what: None,
    ) -> None:
        wanted = {UNIT, *names}
        wanted |= {unit_of(name) for name in wanted}
        self.names = [name for name in ALL_NAMES if name in wanted]
        self.scorer, self.batch, self.rounds, self.tick = scorer, batch, rounds, tick
        self.pass_weights = pass_weights
        self._thresholds = Thresholds(scorer.model, sparsity)
        self.device = next(scorer.model.parameters()).device
        self._weighed = [name for name in self.names if name not in PASSES]

    @property
    def num_ticks(self) -> int:
        """Return how often :meth:`run` calls `tick`."""
        return len(self.names) * (1 + self.rounds) + 2 * len(self._weighed)

    def run(self) -> dict[str, Any]:
        """Measure memory, one candidate after the other, and time them side by side.

        Returns:
            :func:`summary`, and by name ``peak_bytes``, ``peak_over_forward``,
            ``peak_above_weights_bytes``, ``passes`` (who made them), ``weights_per_second`` (of
            passes alone), ``failed`` (what did not fit the device's memory, with the reason) and
            ``interrupted`` (Ctrl-C came after the first round).

        Raises:
            UserError: a loss is not finite, or not even a forward fits.
        """
        found = makers(self.scorer, self.batch, self._thresholds, self.pass_weights)
        failed: dict[str, str] = {}
        peaks = self._peaks(found, failed)  # before all of them are in memory at once
        result, backends = self._timed(found, failed)
        result["weights_per_second"] = {
            name: self.pass_weights / result["median_seconds"][name]
            for name in PASSES
            if name in backends
        }
        peaks = {name: peak for name, peak in peaks.items() if name not in failed}
        size = sum(p.numel() * p.element_size() for p in self.scorer.model.parameters())
        return result | {
            "peak_bytes": peaks,
            "peak_over_forward": {name: peak / peaks[UNIT] for name, peak in peaks.items()},
            "peak_above_weights_bytes": {name: peak - size for name, peak in peaks.items()},
            "passes": backends,
            "failed": failed,
            "interrupted": len(result["rounds"][UNIT]) < self.rounds,
        }

    def _peaks(
        self, found: Mapping[str, Callable[[], Candidate]], failed: dict[str, str]
    ) -> dict[str, int]:
        """Return the peak of each candidate that fits, once all have run and compiled."""
        for name in self._weighed:
            with _fitting(name, failed):
                _check_scores(found[name]().step())
            self.tick(name)
        peaks = {}
        for name in self._weighed:
            if name not in failed and (peak := self._peak(found[name])) is not None:
                peaks[name] = peak
            self.tick(name)
        return peaks

    def _timed(
        self, found: Mapping[str, Callable[[], Candidate]], failed: dict[str, str]
    ) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Return the summary of the candidates that fit, and what made their passes; free them."""
        warm: dict[str, Candidate] = {}
        for name in self.names:
            if name not in failed:
                with _fitting(name, failed):
                    made = found[name]()
                    _check_scores(made.step())  # fills caches
                    warm[name] = made
            self.tick(name)
        if UNIT in failed:
            raise UserError(
                f"batch_size={len(self.batch)}: not even a forward fits the device "
                f"({failed[UNIT]}); lower batch_size or length."
            )
        forwards: dict[str, list[int]] = {}

        def counted(name: str, made: Candidate) -> None:
            if isinstance(record := made.step(), StepRecord):
                forwards.setdefault(name, []).append(record.num_forwards)

        steps = {name: partial(counted, name, made) for name, made in warm.items()}
        seconds = interleave(steps, self.rounds, wait=self._wait, tick=self.tick)
        whole = len(seconds[UNIT])
        forwards = {name: each[:whole] for name, each in forwards.items()}
        passes = {name: made.passes for name, made in warm.items() if made.passes}
        return summary(seconds, forwards), passes

    def grow(self, batches: Mapping[tuple[int, int], Sequence[Candidates]]) -> list[dict[str, Any]]:
        """Time :data:`GROW_NAMES` on rows of other sizes, all interleaved with each other.

        Args:
            batches: rows by (batch size, length).

        Returns:
            A record for each that fits: ``batch_size``, ``length`` and :func:`summary`.

        Raises:
            UserError: a loss is not finite.
        """
        steps: dict[tuple[int, int], dict[str, Step]] = {}
        failed: dict[str, str] = {}
        for size, batch in batches.items():
            found, made = makers(self.scorer, batch, self._thresholds), {}
            for name in GROW_NAMES:
                with _fitting(f"{name} at {size[0]} x {size[1]}", failed):
                    made[name] = found[name]().step
                    made[name]()
                self.tick(name)
            if len(made) == len(GROW_NAMES):
                steps[size] = made
        together = {f"{b} {n} {name}": s for (b, n), m in steps.items() for name, s in m.items()}
        seconds = interleave(together, self.rounds, wait=self._wait, tick=self.tick)
        return [
            {"batch_size": b, "length": n}
            | summary({name: seconds[f"{b} {n} {name}"] for name in GROW_NAMES})
            for b, n in steps
        ]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _peak(self, make: Callable[[], Candidate]) -> int | None:
        """Return the peak bytes of a second step, while no other candidate is in memory.

        On CUDA what tensors took at once, the weights among them. On a CPU the resident memory of
        the process: weights, activations, scratch, and Python with its libraries and what they
        compiled (the same for every candidate: all have run before). Not in it: files that the
        kernel caches. Freed memory that the allocator holds would be taken up again without
        raising the peak, so it is given back first; and pages of the weights that are only mapped
        so far are read, or the first to touch them would pay.

        Returns:
            None where the peak of a process cannot be reset (it needs Linux's /proc).
        """
        if self.device.type == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
            return None
        made = make()
        made.step()
        for parameter in self.scorer.model.parameters():
            parameter.detach().sum()
        memory = PeakMemory(self.device)  # gives back what is freed
        made.step()
        self._wait()
        return memory.read()


def _check_scores(found: object) -> None:
    """Raise NonFiniteLoss where a step gave scores that are none; -inf is one."""
    if isinstance(found, Tensor) and bool((found.isnan() | (found == math.inf)).any()):
        raise NonFiniteLoss("its scores are not finite")


@contextmanager
def _fitting(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Note a candidate that runs out of memory in `failed`, so that the others are still timed.

    Raises:
        UserError: a loss is not finite.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        failed[name] = "out of memory"
    except NonFiniteLoss as error:
        raise UserError(
            f"{name}: {error}; choose dtype=float32, or compute_dtype=bfloat16."
        ) from error

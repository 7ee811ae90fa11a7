"""Watchdogs over a run, and what the precision of its numbers did to it.

All is a function of what a run records (steps, losses, projected gradients, looks at dev) and of
its weights, and what must outlive a process lies in the run's notes: a resumed run decides, and
reports, as one that was never stopped.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smezo_cli.scoring.batching import Found
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.float32 import in_float32
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.zo.noise import hash64, stream_key
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.step import NonFiniteLoss, StepRecord

if TYPE_CHECKING:
    from smezo_cli.methods.base import Method

SPIKE = 10.0  # times the running median of |projected_grad|
HISTORY = 100  # projected gradients that the median is of
ENOUGH = 20  # as many must there be before anything is called a spike
SAMPLE = 4096  # entries looked at of each tensor
PROBED_QUERIES = 2  # of the loss noise, two losses each


class Watch:
    """Counts spikes and clips of the projected gradient, and says when a run should end early.

    Args:
        notes: of the run; what is counted lies in ``notes["watch"]``.
        numerics: measures what steps do to the weights.
        stop_if_diverged: end the run where the dev loss of a look, or the mean train loss since the
            look before, is above this many times ``reference``; None never. The reference is the
            dev loss before training, for a run may have diverged long before its first look; the
            train loss (the same objective, at perturbed weights) shows what dev rows do not. It is
            not asked where steps lower another objective.
        patience: end it after so many looks in a row that were not the best so far; None never.
        reference: the dev loss before training; needed by ``stop_if_diverged`` alone.
        objective: what steps lower: "loss", or 1 less the "accuracy" or "f1".
    """

    def __init__(
        self,
        notes: dict[str, Any],
        numerics: "Numerics",
        *,
        stop_if_diverged: float | None = None,
        patience: int | None = None,
        reference: float | None = None,
        objective: str = "loss",
    ) -> None:
        self._numerics, self._factor, self._patience = numerics, stop_if_diverged, patience
        self._reference, self._objective = reference, objective
        self._seen: dict[str, Any] = notes.setdefault(
            "watch",
            {
                **{"recent": [], "num": 0, "squares": 0.0, "clipped": 0},
                **{"spikes": 0, "largest_spike": None},
                **{"losses": 0.0, "num_losses": 0},  # since the last look
                **{"looks_since": 0, "why": None},
            },
        )

    def before_step(self, is_last: bool) -> None:
        """A step follows; ``is_last`` says that dev is looked at right after it."""
        self._numerics.before_step(is_last)

    def after_step(self, step: int, record: StepRecord) -> str:
        """Take in what the step numbered ``step`` (from 1) measured; a line to say, or ""."""
        self._numerics.after_step(record)
        seen, line = self._seen, ""
        seen["losses"] += record.loss
        seen["num_losses"] += 1
        seen["clipped"] += record.clipped
        # A run that goes on may be older than this count.
        seen["unmoved"] = seen.get("unmoved", 0) + record.unmoved
        for g in record.projected_grad:
            recent: list[float] = seen["recent"]
            scale = statistics.median(recent) if len(recent) >= ENOUGH else 0.0
            # In low precision most losses of a pair may be equal: 0 is no scale.
            if scale > 0 and abs(g) > SPIKE * scale:
                if not seen["spikes"]:
                    line = (
                        f"  step {step:>6}  projected gradient {g:.3g}: {abs(g) / scale:.1f} times "
                        f"the median of the {len(recent)} before (more spikes: at the end)"
                    )
                seen["spikes"] += 1
                largest = seen["largest_spike"]
                if largest is None or abs(g) / scale > largest["times_median"]:
                    times = abs(g) / scale
                    seen["largest_spike"] = {"step": step, "value": g, "times_median": times}
            seen["recent"] = [*recent, abs(g)][-HISTORY:]
            seen["num"] += 1
            seen["squares"] += g * g
        return line

    def look(self, loss: float, is_best: bool) -> dict[str, float]:
        """Take in the dev loss of a look, after which :attr:`why` is decided anew.

        Args:
            loss: on dev.
            is_best: no look before was as good.

        Returns:
            The numerics report so far, for the look's record.
        """
        seen = self._seen
        seen["looks_since"] = 0 if is_best else seen["looks_since"] + 1
        seen["why"] = None
        train_loss = seen["losses"] / seen["num_losses"] if seen["num_losses"] else 0.0
        seen["losses"], seen["num_losses"] = 0.0, 0
        if self._factor is not None and self._reference is not None:
            limit = self._factor * self._reference
            found = (("dev loss", loss), ("mean train loss since the last look", train_loss))
            for name, value in found if self._objective == "loss" else found[:1]:
                if value > limit and seen["why"] is None:
                    seen["why"] = (
                        f"the {name}, {value:.4g}, is above {self._factor:g} times the dev loss "
                        f"before training, {self._reference:.4g} "
                        f"(stop_if_diverged={self._factor:g})"
                    )
        if self._patience is not None and seen["looks_since"] >= self._patience:
            seen["why"] = seen["why"] or (
                f"{seen['looks_since']} looks without a new {best_words(self._objective)} "
                f"(patience={self._patience})"
            )
        return self._numerics.look()

    @property
    def why(self) -> str | None:
        """Why the run should end at the look just taken, None where it should not."""
        why: str | None = self._seen["why"]
        return why


def best_words(objective: str) -> str:
    """What the best look at dev is the best by."""
    return "lowest dev loss" if objective == "loss" else f"highest dev {objective}"


def spike_report(notes: Mapping[str, Any]) -> dict[str, Any] | None:
    """result.json's "watch" from a run's notes; None of a run without projected gradients.

    Its values: ``projected_grads`` measured, their root mean square ``projected_grad_rms``, how
    many were ``clipped``, how many were ``spikes``, the ``largest_spike`` (times the median), and
    how many were 0, their probes ``unmoved``: two losses that are the same number.
    """
    seen = notes.get("watch")
    if not seen or not seen["num"]:
        return None
    return {
        "projected_grads": seen["num"],
        "projected_grad_rms": math.sqrt(seen["squares"] / seen["num"]),
        **{key: seen[key] for key in ("clipped", "spikes", "largest_spike")},
        "unmoved": seen.get("unmoved", 0),
    }


# --- what steps did to the weights -------------------------------------------------------------


@dataclass
class _Sample:
    """Some entries of a tensor: all of a small one, else drawn with replacement."""

    name: str
    parameter: nn.Parameter
    index: Tensor | None  # int32 (int64 in huge tensors), flat; None is all
    base: Tensor  # of the base model, in the parameter's dtype

    @property
    def now(self) -> Tensor:
        """The present entries, a copy."""
        flat = self.parameter.detach().view(-1)
        return flat.clone() if self.index is None else flat.index_select(0, self.index)

    @property
    def weight(self) -> float:
        """Entries of the tensor for which one of these stands."""
        return self.parameter.numel() / len(self.base)


class Numerics:
    """How far weights moved since the base model, and which updates low precision swallowed.

    Estimates from at most :data:`SAMPLE` entries of each tensor, drawn by a key and weighted by the
    size of the tensor; exact for tensors that are not larger. Its figures at a look:

    * ``moved_share``: share of the trained weights that differ from the base model's;
    * ``rms_move``: root mean square of the difference, over all trained weights;
    * ``underflow``: share of the weights under the mask that the last update before the look left
      as they were though their coefficient was not 0; None for first-order methods.

    Args:
        method: its ``trained`` tensors hold the base model's weights now.
        seed: draws the sample.
        notes: of the run; the figures lie in ``notes["numerics"]``.
    """

    def __init__(self, method: "Method", seed: int, notes: dict[str, Any]) -> None:
        self._method = method if isinstance(method, ZeroOrder) else None
        self._notes = notes
        self._samples: list[_Sample] = []
        self._before: list[Tensor] = []
        for name, parameter in method.trained.items():
            numel, index = parameter.numel(), None
            if numel > SAMPLE:
                key = torch.tensor(stream_key(seed, "numerics", name))
                drawn = (hash64(torch.arange(SAMPLE), key) % numel).sort().values
                drawn = drawn.to(torch.int32) if numel < 2**31 else drawn
                index = drawn.to(parameter.device)
            sample = _Sample(name, parameter, index, torch.empty(0))
            sample.base = sample.now
            self._samples.append(sample)

    @property
    def _figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = self._notes.setdefault("numerics", {})
        return figures

    def before_step(self, is_last: bool) -> None:
        """Keep the sampled weights where dev is looked at right after the step."""
        if is_last and self._method is not None:
            self._before = [s.now for s in self._samples]

    def after_step(self, record: StepRecord) -> None:
        """Which of the weights kept did the update leave as they were?"""
        method, before, self._before = self._method, self._before, []
        if method is None or not before:
            return
        self._figures["underflow"] = None
        if not any(record.projected_grad):
            return
        active = lost = 0.0
        for s, was in zip(self._samples, before, strict=True):
            index = torch.arange(len(was), device=was.device) if s.index is None else s.index.long()
            mask = method.mask_at(s.parameter, was, index, method.num_steps - 1)
            active += s.weight * int(mask.sum())
            lost += s.weight * int((mask & (s.now == was)).sum())
        self._figures["underflow"] = lost / active if active else None

    def look(self) -> dict[str, Any]:
        """The figures at the present weights."""
        moved = squares = 0.0
        total = sum(s.parameter.numel() for s in self._samples)
        for s in self._samples:
            now = s.now
            moved += s.weight * int((now != s.base).sum())
            squares += s.weight * float((now.double() - s.base.double()).square().sum())
        self._figures.update({"moved_share": moved / total, "rms_move": math.sqrt(squares / total)})
        self._figures["sampled"] = sum(len(s.base) for s in self._samples)
        names = ("moved_share", "rms_move", "underflow")
        return {name: self._figures[name] for name in names if self._figures.get(name) is not None}


def loss_noise(
    method: ZeroOrder,
    scorer: Scorer,
    rows: Sequence[Candidates],
    objective: str = "loss",
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """How far the losses of a run in low precision are from those of the same weights in float32.

    On one batch at four probes of the next step, theta +- eps z of two queries, stored in the
    weights' dtype: four forwards in the run's precision and four in float32. Of a run with another
    objective "losses" are that objective. ``between`` is called before each forward, and may raise.

    Returns:
        ``loss_error_rms`` and ``loss_error_mean`` of the differences; ``loss_noise``, their
        standard deviation, since what all probes share cancels in a projected gradient;
        ``projected_grad_noise`` = loss_noise / (sqrt(2) eps), the standard deviation that it gives
        to a projected gradient [L(+) - L(-)] / (2 eps); ``noise_forwards``, not counted elsewhere.

    Raises:
        NonFiniteLoss: a loss is NaN or infinite.
        RuntimeError: the model mixes dtypes of its own accord, or memory does not suffice.
    """
    exact = Scorer(scorer.model, scorer.tokenizer, places_before=scorer.places_before)
    Found(scorer.batching, scorer.batching_of_answers).to(exact)
    scorer.model.eval()
    errors: list[float] = []

    def measured(by: Scorer) -> Tensor:
        between()
        return by.objective(rows, objective)

    for query in range(PROBED_QUERIES):
        low = method.losses_at(lambda: measured(scorer), query)
        with in_float32(scorer.model):
            high = method.losses_at(lambda: measured(exact), query)
        errors += [a - b for a, b in zip(low, high, strict=True)]
    if not all(map(math.isfinite, errors)):
        raise NonFiniteLoss("a loss is not finite")
    noise = statistics.stdev(errors)
    return {
        "loss_error_rms": math.sqrt(statistics.fmean(e * e for e in errors)),
        "loss_error_mean": statistics.fmean(errors),
        "loss_noise": noise,
        "projected_grad_noise": noise / (math.sqrt(2) * method.param_groups[0]["eps"]),
        "noise_forwards": 2 * len(errors),
    }


def report_lines(numerics: Mapping[str, Any] | None, watch: Mapping[str, Any] | None) -> list[str]:
    """The closing lines of a run about its numbers."""
    lines = []
    if numerics and "moved_share" in numerics:
        moved, rms = numerics["moved_share"], numerics["rms_move"]
        line = f"  weights moved  {moved:.4f} of them, rms {rms:.2e}"
        if numerics.get("underflow") is not None:
            line += f"; the last update left {numerics['underflow']:.4f} of the active as they were"
        lines.append(line)
    if numerics and numerics.get("loss_noise") is not None and watch:
        lines.append(
            f"  low precision  loss noise {numerics['loss_noise']:.2e}, of a projected gradient "
            f"{numerics['projected_grad_noise']:.3g} (rms {watch['projected_grad_rms']:.3g})"
        )
    if watch and watch["spikes"]:
        largest = watch["largest_spike"]
        lines.append(
            f"  spikes         {watch['spikes']} projected gradients above {SPIKE:g} times their "
            f"median, the largest {largest['times_median']:.1f} times at step {largest['step']}"
        )
    if watch and watch["clipped"]:
        lines.append(
            f"  clipped        {watch['clipped']} of {watch['projected_grads']} projected gradients"
        )
    if watch and watch.get("unmoved"):
        lines.append(
            f"  unmoved        {watch['unmoved']} of {watch['projected_grads']} probes gave the "
            "same loss on both sides"
        )
    return lines

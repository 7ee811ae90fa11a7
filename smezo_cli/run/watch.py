"""Watchdogs over a run, and what the precision of its numbers did to it.

All is a function of what a run records (steps, losses, projected gradients, looks at dev) and of
its weights, and what must outlive a process lies in the run's notes: a resumed run decides, and
reports, as one that was never stopped.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from smezo_cli.run.numerics import Numerics
from smezo_cli.store.notes import Notes
from smezo_cli.zo.step import StepRecord

SPIKE = 10.0  # times the running median of |projected_grad|
HISTORY = 100  # projected gradients that the median is of
ENOUGH = 20  # as many must there be before anything is called a spike


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
        notes: Notes,
        numerics: "Numerics",
        *,
        stop_if_diverged: float | None = None,
        patience: int | None = None,
        reference: float | None = None,
        objective: str = "loss",
    ) -> None:
        self._numerics, self._factor, self._patience = numerics, stop_if_diverged, patience
        self._reference, self._objective = reference, objective
        self._seen = notes.setdefault(
            "watch",
            {
                "recent": [],
                "num": 0,
                "squares": 0.0,
                "clipped": 0,
                "spikes": 0,
                "largest_spike": None,
                "losses": 0.0,  # since the last evaluation
                "num_losses": 0,
                "looks_since": 0,
                "why": None,
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


def spike_report(notes: Notes) -> dict[str, Any] | None:
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

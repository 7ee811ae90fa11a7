"""Monitor a run: spikes of the projected gradient, divergence, early stopping.

What the watch decides follows from what the run records (steps, losses, projected gradients,
evaluations of dev). What it counts lies in the run's notes, so that a resumed run decides and
reports as one that was never stopped.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from smezo_cli.run.numerics import Numerics
from smezo_cli.store.notes import Notes
from smezo_cli.zo.step import StepRecord

SPIKE = 10.0  # times the running median of |projected_grad|
HISTORY = 100  # the last projected gradients, of which the median is taken
ENOUGH = 20  # with fewer projected gradients nothing is called a spike


class Watch:
    """Count spikes and clips of the projected gradient, and say when a run should end early.

    Args:
        notes: of the run; the counts lie in ``notes["watch"]``.
        numerics: measures what steps do to the weights.
        stop_if_diverged: end the run if the dev loss, or the mean train loss since the evaluation
            before, exceeds this many times ``reference``; None: never. The reference is the dev
            loss before training, since a run may diverge long before its first evaluation. The
            train loss (the same objective, at perturbed weights) shows what dev rows do not; it is
            left out if steps lower another objective.
        patience: end the run after so many evaluations in a row without a new best; None: never.
        reference: the dev loss before training; only ``stop_if_diverged`` needs it.
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
        """Prepare for a step; ``is_last`` says that dev is evaluated right after it."""
        self._numerics.before_step(is_last)

    def after_step(self, step: int, record: StepRecord) -> str:
        """Record what the step numbered ``step`` (from 1) measured; return a warning, or ""."""
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
            # In low precision the losses of most pairs may be equal: a median of 0 is no scale.
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

    def after_evaluation(self, loss: float, is_best: bool) -> dict[str, float]:
        """Record an evaluation of dev, and decide :attr:`why` anew.

        Args:
            loss: on dev.
            is_best: no evaluation before was as good.

        Returns:
            What :meth:`Numerics.measure` found, for the log.
        """
        seen = self._seen
        seen["looks_since"] = 0 if is_best else seen["looks_since"] + 1
        seen["why"] = None
        train_loss = seen["losses"] / seen["num_losses"] if seen["num_losses"] else 0.0
        seen["losses"], seen["num_losses"] = 0.0, 0
        if self._factor is not None and self._reference is not None:
            limit = self._factor * self._reference
            found = (("dev loss", loss), ("mean train loss since the last evaluation", train_loss))
            for name, value in found if self._objective == "loss" else found[:1]:
                if value > limit and seen["why"] is None:
                    seen["why"] = (
                        f"the {name}, {value:.4g}, is above {self._factor:g} times the dev loss "
                        f"before training, {self._reference:.4g} "
                        f"(stop_if_diverged={self._factor:g})"
                    )
        if self._patience is not None and seen["looks_since"] >= self._patience:
            seen["why"] = seen["why"] or (
                f"{seen['looks_since']} evaluations without a new {best_words(self._objective)} "
                f"(patience={self._patience})"
            )
        return self._numerics.measure()

    @property
    def why(self) -> str | None:
        """Return why the run should end at the evaluation just recorded; None: it should go on."""
        why: str | None = self._seen["why"]
        return why


def best_words(objective: str) -> str:
    """Return the words for what the best evaluation of dev is the best by."""
    return "lowest dev loss" if objective == "loss" else f"highest dev {objective}"


def spike_report(notes: Notes) -> dict[str, Any] | None:
    """Return result.json's "watch"; None for a run without projected gradients.

    Its values: the number of ``projected_grads``, their root mean square ``projected_grad_rms``,
    how many were ``clipped``, how many were ``spikes``, the ``largest_spike`` (times the median),
    and how many probes left the loss ``unmoved``: both losses were the same number.
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
    """Return the closing lines about weights, precision, spikes and clips."""
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

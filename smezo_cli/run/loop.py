"""Run the training loop: batch, step, log, evaluate dev, save. It is the same for every method."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from smezo_cli.config.settings import Settings
from smezo_cli.machine.memory import PeakMemory
from smezo_cli.machine.stop import Stopped
from smezo_cli.methods.base import Method
from smezo_cli.run.batches import Batches
from smezo_cli.run.console import Bar, Console, in_words
from smezo_cli.run.loggers import Loggers, logged
from smezo_cli.run.measure import Measure
from smezo_cli.run.watch import Watch
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.store.folder import RunFolder, State
from smezo_cli.store.notes import Notes
from smezo_cli.store.trajectory import Recorder, seconds_between
from smezo_cli.zo.schedule import lr_factor
from smezo_cli.zo.step import StepRecord


@dataclass(frozen=True)
class Checkpoint:
    """Keep in the run folder what the run goes on from.

    With a recorder, weights follow from the recorded steps, and are saved only now and then.

    Attributes:
        state: where the run stands.
        folder: of the run.
        recorder: of its steps, None for a method whose steps cannot be applied again.
        memory: whose peak the state holds.
        keep: which weights stay: "best", "last" or "all".
        full_save_every: steps between two saves of weights, with a recorder.
    """

    state: State
    folder: RunFolder
    recorder: Recorder | None
    memory: PeakMemory
    keep: str
    full_save_every: int

    @property
    def notes(self) -> Notes:
        """Return the notes of the state."""
        return self.state.notes

    def saves_now(self) -> bool:
        """Say whether a recorded run lacks weights of this step that it should have saved."""
        if self.recorder is None or not self._is_whole():
            return False
        return self.state.step not in self.state.weights()

    def save(self, method: Method, standing: tuple[int, str]) -> None:
        """Save the state, with the weights where they do not follow from recorded steps.

        Args:
            method: whose weights they are.
            standing: length of metrics.jsonl so far, and its SHA-256.
        """
        state, folder = self.state, self.folder
        state.method, tensors = method.snapshot()
        state.peak_memory_bytes = max(state.peak_memory_bytes, self.memory.read())
        state.metrics_bytes, state.metrics_sha256 = standing
        if self.recorder is not None:
            self.recorder.sync()
        if self.recorder is None or self._is_whole():
            folder.save(state, method.trained, tensors, self.keep)
            return
        if method.keeps_state and state.best_step == state.step:
            # To make them again would take the state of a step before, which nobody keeps.
            folder.save_weights(state, state.step, method.trained, state.method)
        folder.settle(state, self.keep)

    def drop_unevaluated(self) -> None:
        """Forget weights that a stop between two evaluations left: keep=all has no others such."""
        if self.recorder is None and not 0 < self.state.step == self.state.looked:
            self.state.files.pop(self.folder.weights_path(self.state.step).name, None)

    def _is_whole(self) -> bool:
        step = self.state.step
        evaluated = self.keep == "all" and self.state.looked == step
        return step > 0 and (evaluated or step % self.full_save_every == 0)


@dataclass(frozen=True)
class Reporter:
    """Tell of a run while it trains.

    Attributes:
        loggers: receive a record of each step and each evaluation.
        console: receives a line of each evaluation.
        bar: moves with the steps.
        watch: sees each step, and ends the run early where it goes wrong.
    """

    loggers: Loggers
    console: Console
    bar: Bar
    watch: Watch


def fit(
    method: Method,
    batches: Batches,
    measure: Measure,
    evaluate_dev: Callable[[], Evaluation],
    checkpoint: Checkpoint,
    reporter: Reporter,
    settings: Settings,
    stopped: Callable[[], bool],
) -> None:
    """Train up to ``settings.steps``; then ``checkpoint.state.best_step`` names the best weights.

    Dev is evaluated, and everything saved, every ``eval_every`` steps and after the last one; the
    run ends earlier after an evaluation if the watch says why. The best evaluation has the lowest
    dev loss or, for the objectives "accuracy" and "f1", the highest metric (of equals, the lowest
    loss). With ``keep=last`` the last weights count as the best; with ``keep=all`` those of every
    evaluation are kept.

    A step that the checkpoint's recorder holds is applied, not computed, and logged as recorded.

    Args:
        method: at the weights of the checkpoint's state.
        batches: the rows of each step.
        measure: takes the steps.
        evaluate_dev: evaluates dev at the present weights.
        checkpoint: where the run stands, and where it is saved.
        reporter: is told of each step.
        settings: of the run.
        stopped: says whether to stop, between two steps.

    Raises:
        Stopped: asked to; the state is saved and the same call goes on from there.
        NonFiniteLoss: the weights are those before that step, the checkpoint that of the last
            evaluation.
        NonFiniteScore: of a row of dev, at the present weights; the checkpoint likewise.
    """
    state, watch, loggers = checkpoint.state, reporter.watch, reporter.loggers
    checkpoint.drop_unevaluated()
    note = ""
    with reporter.bar as bar:
        while True:
            if state.looked < state.step and _evaluates_after(state.step, settings):
                try:
                    found = evaluate_dev()
                except Stopped:
                    checkpoint.save(method, loggers.standing())
                    raise
                note = _take_in(found, method, measure.objective, checkpoint, reporter)
            elif checkpoint.saves_now():
                checkpoint.save(method, loggers.standing())
            if state.step == settings.steps or watch.why is not None:
                return
            if stopped():
                checkpoint.save(method, loggers.standing())
                raise Stopped
            watch.before_step(_evaluates_after(state.step + 1, settings))
            record, seconds = _step(method, batches, measure, checkpoint, settings)
            state.step += 1
            state.train_seconds += seconds
            state.num_forwards += record.num_forwards
            loggers.log(
                {
                    "step": state.step,
                    "loss": record.loss,
                    "projected_grad": list(record.projected_grad),
                    **({"clipped": record.clipped} if record.clipped else {}),
                    **({"unmoved": record.unmoved} if record.unmoved else {}),
                    "num_forwards": record.num_forwards,
                    "seconds": seconds,
                }
            )
            if line := watch.after_step(state.step, record):
                reporter.console.say(line)
            bar.step(1, f"loss {record.loss:.4f}  {note}")


def _evaluates_after(step: int, settings: Settings) -> bool:
    """Say whether dev is evaluated after a step."""
    return step % settings.eval_every == 0 or step == settings.steps


def _step(
    method: Method,
    batches: Batches,
    measure: Measure,
    checkpoint: Checkpoint,
    settings: Settings,
) -> tuple[StepRecord, float]:
    """Apply the next step where it is recorded, else take and record it; return its seconds too."""
    recorder, step = checkpoint.recorder, checkpoint.state.step
    made = None if recorder is None else recorder.apply(step)
    if made is not None and recorder is not None:
        return recorder.method.record(made.loss, made.scalars, step), made.seconds
    s, every = settings, settings.eval_every
    method.set_lr_factor(lr_factor(s.lr_schedule, step, s.steps, s.warmup_steps))
    measure.scorer.model.train(method.mode == "train")
    start = time.perf_counter()
    measure.lead(step, min(s.steps, (step // every + 1) * every))
    record = measure.step(method, *batches.of_step(method, step))
    seconds = seconds_between(start, time.perf_counter())
    if recorder is not None:
        seconds = recorder.append(step, record, seconds)
    return record, seconds


def _take_in(
    found: Evaluation,
    method: Method,
    objective: str,
    checkpoint: Checkpoint,
    reporter: Reporter,
) -> str:
    """Note, log, save and say an evaluation of dev; return some words for the bar."""
    state, notes, folder = checkpoint.state, checkpoint.notes, checkpoint.folder
    metrics = found.figures()
    notes["final_share"] = share = method.active_share()
    raised = None if objective == "loss" else metrics[objective]
    is_best = _note_if_best(metrics["loss"], raised, notes)
    if is_best or checkpoint.keep == "last":
        state.best_step, state.best_loss = state.step, metrics["loss"]
        notes["best_look"] = metrics
        folder.save_scores(folder.scores_so_far() | {"dev": found.scores})
    state.looked = state.step
    reporter.loggers.log(
        {"step": state.step}
        | logged("dev", metrics)
        | {"active_share": share}
        | reporter.watch.after_evaluation(metrics["loss"], is_best)
    )
    checkpoint.save(method, reporter.loggers.standing())
    reporter.console.say(
        f"  step {state.step:>6}  dev {found.metric} {metrics[found.metric]:.4f}  "
        f"dev loss {metrics['loss']:.4f}  active share {share:.3f}"
        + ("  (best)" if is_best else "")
    )
    if line := in_words(metrics, found.metric):
        reporter.console.say(f"              {line}")
    return f"dev {metrics[found.metric]:.3f}"


def _note_if_best(loss: float, metric: float | None, notes: Notes) -> bool:
    """Say whether an evaluation of dev is the best so far, and note it if it is.

    Args:
        loss: of the evaluation.
        metric: that the run raises; None: it lowers the loss.
        notes: of the run.
    """
    lowest, highest = notes.get("lowest_loss"), notes.get("highest_metric")
    is_best = lowest is None or loss < lowest
    if metric is not None and highest is not None and metric != highest:
        is_best = metric > highest
    if is_best:
        notes["lowest_loss"] = loss
        if metric is not None:
            notes["highest_metric"] = metric
    return is_best

"""The training loop: batch -> step -> log -> look at dev -> save. The same for every method."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smezo_cli.machine.memory import PeakMemory
from smezo_cli.machine.stop import Stopped
from smezo_cli.methods.base import Method
from smezo_cli.run.batches import Batches
from smezo_cli.run.console import Console
from smezo_cli.run.loggers import Logger
from smezo_cli.run.measure import Measure
from smezo_cli.run.watch import Watch
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.store.folder import RunFolder, State
from smezo_cli.store.trajectory import Recorder, seconds_between
from smezo_cli.zo.schedule import lr_factor


def fit(
    method: Method,
    measure: Measure,
    train: Sequence[Candidates],
    *,
    on_dev: Callable[[], Evaluation],
    lead: Callable[[int, int], None],
    steps: int,
    batch_size: int,
    batch_order: str,
    eval_every: int,
    lr_schedule: str,
    warmup_steps: int,
    keep: str,
    seed: int,
    state: State,
    folder: RunFolder,
    recorder: Recorder | None,
    full_save_every: int,
    loggers: Sequence[Logger],
    log_standing: Callable[[], tuple[int, str]],
    console: Console,
    memory: PeakMemory,
    watch: Watch,
    stopped: Callable[[], bool],
) -> None:
    """Train from ``state.step`` to ``steps``; then ``state.best_step`` names the best weights.

    Dev is looked at (and everything saved) every ``eval_every`` steps and after the last; a run may
    end earlier, at a look after which ``watch`` says why. ``on_dev`` is what the present weights
    make of dev; ``lead`` is told of each step that is computed, and of that with the next look, for
    the ranks that take it too. The best look is that with the lowest dev loss, or where the
    objective is "accuracy" or "f1" with the highest (of equals the lowest loss).
    With ``keep="last"`` the last weights count as the best, with "all" those of every look are
    kept.

    With a recorder a step that it holds is applied, not computed, and the figures are those that it
    holds; weights are then saved every ``full_save_every`` steps, for the others follow from it.

    Raises:
        Stopped: asked to; the state is saved and the same call goes on from there.
        NonFiniteLoss: the weights are those before that step, the checkpoint that of the last look.
        NonFiniteScore: of a row of dev, at the present weights; the checkpoint likewise.
    """
    batches = Batches(train, batch_size, seed, batch_order)
    objective, scorer = measure.objective, measure.scorer

    if recorder is None and not 0 < state.step == state.looked:
        # Weights that a stop between two looks has left: no other run has them (keep=all).
        state.files.pop(folder.weights_path(state.step).name, None)

    def save() -> None:
        state.method, tensors = method.snapshot()
        state.peak_memory_bytes = max(state.peak_memory_bytes, memory.read())
        state.metrics_bytes, state.metrics_sha256 = log_standing()
        if recorder is not None:
            recorder.sync()
        if recorder is None or full_due():
            folder.save(state, method.trained, tensors, keep)
        else:
            if method.keeps_state and state.best_step == state.step:
                # To make them again would take the state of a step before, which nobody keeps.
                folder.save_weights(state, state.step, method.trained, state.method)
            folder.settle(state, keep)

    def full_due() -> bool:
        looked = keep == "all" and state.looked == state.step
        return state.step > 0 and (looked or state.step % full_save_every == 0)

    def is_look(step: int) -> bool:
        return step % eval_every == 0 or step == steps

    def log(record: Mapping[str, Any]) -> None:
        for logger in loggers:
            logger.log(record)

    note = ""
    with console.bar("train", steps, state.step) as bar:
        while True:
            if state.looked < state.step and is_look(state.step):
                try:
                    found = on_dev()
                except Stopped:
                    save()
                    raise
                look = found.figures()
                state.notes["final_share"] = share = method.active_share()
                lowest, highest = map(state.notes.get, ("lowest_loss", "highest_metric"))
                metric = None if objective == "loss" else look[objective]
                is_best = lowest is None or look["loss"] < lowest
                if metric is not None and highest is not None and metric != highest:
                    is_best = metric > highest
                if is_best:
                    state.notes["lowest_loss"] = look["loss"]
                    if metric is not None:
                        state.notes["highest_metric"] = metric
                if is_best or keep == "last":
                    state.best_step, state.best_loss = state.step, look["loss"]
                    state.notes["best_look"] = look
                    folder.save_scores(folder.scores_so_far() | {"dev": found.scores})
                state.looked = state.step
                log(
                    {"step": state.step}
                    | {f"dev.{k}": v for k, v in look.items() if k not in ("standard_error", "n")}
                    | {"active_share": share}
                    | watch.look(look["loss"], is_best)
                )
                save()
                note = f"dev {look[found.metric]:.3f}"
                console.say(
                    f"  step {state.step:>6}  dev {found.metric} {look[found.metric]:.4f}  "
                    f"dev loss {look['loss']:.4f}  active share {share:.3f}"
                    + ("  (best)" if is_best else "")
                )
            elif recorder is not None and full_due() and state.step not in state.weights():
                save()
            if state.step == steps or watch.why is not None:
                return
            if stopped():
                save()
                raise Stopped

            watch.before_step(is_look(state.step + 1))
            made = None if recorder is None else recorder.apply(state.step)
            if made is not None and recorder is not None:
                record = recorder.method.record(made.loss, made.projected_grad)
                seconds = made.seconds
            else:
                batch = [train[i] for i in batches(state.step)]
                method.set_lr_factor(lr_factor(lr_schedule, state.step, steps, warmup_steps))
                scorer.model.train(method.mode == "train")
                start = time.perf_counter()
                lead(state.step, min(steps, (state.step // eval_every + 1) * eval_every))
                record = measure.step(method, batch)
                seconds = seconds_between(start, time.perf_counter())
                if recorder is not None:
                    seconds = recorder.append(state.step, record, seconds)

            state.step += 1
            state.train_seconds += seconds
            state.num_forwards += record.num_forwards
            log(
                {
                    "step": state.step,
                    "loss": record.loss,
                    "projected_grad": list(record.projected_grad),
                    **({"clipped": record.clipped} if record.clipped else {}),
                    **({"unmoved": record.unmoved} if record.unmoved else {}),
                    "seconds": seconds,
                }
            )
            if line := watch.after_step(state.step, record):
                console.say(line)
            bar.step(1, f"loss {record.loss:.4f}  {note}")

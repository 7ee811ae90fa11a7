"""Make one run: its stages in order, and what becomes of it where one of them fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from smezo_cli.config.digest import is_extensible
from smezo_cli.config.fixed import is_frozen
from smezo_cli.errors import Diverged, UserError
from smezo_cli.machine import allocator
from smezo_cli.machine.out_of_memory import SHORTER, refusing_out_of_memory
from smezo_cli.machine.stop import Stopped
from smezo_cli.machine.waiting import waiting
from smezo_cli.methods.base import replays
from smezo_cli.methods.frozen import InContext, LinearProbe
from smezo_cli.run import (
    best,
    frozen,
    kept_inputs,
    layers,
    leader,
    mask,
    numerics,
    result,
    resume,
    rows,
    self_check,
    zero_shot,
)
from smezo_cli.run.batches import batches_of
from smezo_cli.run.begin import Run, announce
from smezo_cli.run.closing import clean, close, keep_scores, loggers_of
from smezo_cli.run.dev import evaluate_dev
from smezo_cli.run.evaluator import Evaluator
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.loop import Checkpoint, Reporter, fit
from smezo_cli.run.method import build_frozen, build_method
from smezo_cli.run.not_finite import diverged
from smezo_cli.run.prepare import measure_for, passes_of, prepare, watch_for
from smezo_cli.run.result import SoFar
from smezo_cli.store.folder import UNSETTLED
from smezo_cli.store.partial_scores import NAME, PartialScores
from smezo_cli.store.trajectory import check_length
from smezo_cli.zo.step import NonFiniteLoss
from smezo_cli.zo.turns import NotInLockstep


def finish(run: Run) -> dict[str, Any]:
    """Take the stages of a run that are left; return the content of result.json.

    Of a finished run that is mended the result stays until the mending is complete.
    """
    so_far = SoFar()
    announce(run)
    run.state.notes.pop(UNSETTLED, None)  # of a run that now goes on
    if (before := _reopened(run)) is None:
        run.folder.write_result(result.of(run, so_far, "running"))

    def end(status: str, why: str) -> None:
        if before is not None:
            run.say("  result.json stays that of the finished run, which is not mended yet")
        close(run, so_far, before or result.of(run, so_far, status, error=why))

    try:
        with refusing_out_of_memory("for this run", SHORTER):
            done = _stages(run, so_far)
    except NonFiniteLoss as error:
        assert so_far.loaded is not None  # which loss could it be of?
        end("diverged", str(error))
        raise Diverged(diverged(run, so_far.loaded, error)) from error
    except NotInLockstep as error:
        end("failed", str(error))
        raise UserError(f"method: {error}.") from error
    except BaseException as error:
        status = "stopped" if run.stopped() else "failed"
        try:
            keep_scores(run, so_far.partial)
        finally:  # whatever becomes of the scores, the run is closed
            end(status, f"{type(error).__name__}: {error}".removesuffix(": "))
        raise
    # A run with a trajectory needs the best weights alone, to go on too; unless its method has
    # tensors of its own, which would be made again from the first step on.
    goes_on = so_far.recorder is None or so_far.keeps_state
    goes_on = goes_on and is_extensible(run.settings.lr_schedule)
    run.notes.pop("reopened", None)
    # A kill behind the result must not leave what is to go: the next start reads it here.
    run.notes["unsettled"] = {"goes_on": goes_on}
    run.folder.save_state(run.state)
    close(run, so_far, done)
    clean(run, done)
    run.say(result.summary(run, done))
    return done


def _reopened(run: Run) -> dict[str, Any] | None:
    """Return the result that a run has already, and is to keep until it has the same anew.

    A note says that the run is being mended: its files may look whole before that is done.
    """
    done = run.folder.result()
    if done is None or done.get("status") != "done" or done["steps"] != run.settings.steps:
        run.notes.pop("reopened", None)
        return None
    run.notes["reopened"] = True
    run.folder.save_state(run.state)
    return done


def _stages(run: Run, so_far: SoFar) -> dict[str, Any]:
    """Load, check that ranks and data are those of the run, and go on by the kind of method."""
    if run.team is not None:
        leader.call(run, run.team)
    so_far.loaded = loaded = Loaded(run.settings, str(run.device), run.say)
    loaded.scorer.most_at_once = run.notes.get("most_at_once", {})
    so_far.partial = partial = PartialScores(run.folder.path / NAME, loaded.model)
    if run.team is not None:
        leader.agree(run, loaded, run.team)
    resume.check_data(run, loaded)
    evaluate = Evaluator(run, loaded, partial, run.team)
    stages = _without_steps if is_frozen(run.settings.method) else _with_steps
    return stages(run, so_far, loaded, evaluate)


@contextmanager
def _stoppable(run: Run, loaded: Loaded) -> Iterator[None]:
    """Raise Stopped between two forwards within the context; a prompt that was chosen is saved.

    Only for forwards that no other rank takes part in.
    """
    try:
        with loaded.scorer.forward.calling(run.check_stop):
            yield
    except Stopped:
        if "prompt" in run.notes:
            run.folder.save_state(run.state)
        raise


def _without_steps(run: Run, so_far: SoFar, loaded: Loaded, evaluate: Evaluator) -> dict[str, Any]:
    """Evaluate dev and test by a method that takes no steps."""
    method = build_frozen(loaded)
    run.stop.patient = True
    with _stoppable(run, loaded):
        zero_shot.choose_batching(run, loaded)
    dev = zero_shot.choose_prompt(run, evaluate)
    so_far.rows = rows.encode(run, loaded)
    test = zero_shot.measure(run, evaluate, so_far.rows)
    if isinstance(method, InContext):
        so_far.rows = frozen.demonstrate(run, evaluate, method, so_far.rows)
    elif isinstance(method, LinearProbe):
        frozen.probe(run, evaluate, method, so_far.rows)
    asked = frozen.ask(run, evaluate, method, so_far.rows, dev, test)
    so_far.loggers = loggers_of(run)
    frozen.log_dev(run, asked.dev, so_far.loggers)
    tested = best.report(run, asked.test, loaded.task.test, so_far.rows.dev, asked.dev.scores)
    return result.of(run, so_far, "done", test=tested)


def _with_steps(run: Run, so_far: SoFar, loaded: Loaded, evaluate: Evaluator) -> dict[str, Any]:
    """Train, and test the best weights."""
    s, state = run.settings, run.state
    layers.settle(run, loaded)
    mask.settle(run, loaded)
    if run.team is not None:
        leader.hand_layers(run, run.team)
        leader.hand_mask(run, run.team)
    with waiting("preparing the passes"):
        method = build_method(loaded)
    if replays(method):
        check_length(s.steps, method.num_scalars)
    kept_inputs.check(run, loaded, method)
    so_far.measure = measure = measure_for(run, loaded, method)
    so_far.keeps_state, so_far.passes = method.keeps_state, passes_of(run, method)
    with _stoppable(run, loaded):
        is_checked = self_check.check_early(run, loaded, method)
    allocator.give_back()
    moved = numerics.Numerics(method, s.seed, run.notes)  # from the base model on
    run.stop.patient = True  # from here on there is a state to save
    with _stoppable(run, loaded):
        zero_shot.choose_batching(run, loaded)
    kept_inputs.start(run, loaded, method)
    with loaded.as_it_came():
        as_it_came = evaluate.without_adapter()
        zero_shot.choose_prompt(run, as_it_came)
        so_far.rows = rows.encode(run, loaded)
        zero_shot.measure(run, as_it_came, so_far.rows)
    so_far.recorder = resume.put_back(run, loaded, method)
    if run.team is not None:
        leader.teach(run, run.team, so_far.recorder)
    allocator.give_back()  # what reading and encoding the data has freed
    batches = batches_of(so_far.rows.train, s.batch_size, s.seed, s.batch_order)
    with _stoppable(run, loaded):
        if not is_checked:
            self_check.check(run, loaded, method, so_far.rows.train)
        kept_inputs.settle(run, loaded, so_far.rows)
        prepare(run, method, measure, batches)
    allocator.give_back()
    so_far.loggers = loggers_of(run)
    watch, bar = watch_for(run, moved), run.console.bar("train", s.steps, state.step)
    fit(
        method,
        batches,
        measure,
        evaluate_dev(run, evaluate, method, so_far.rows),
        Checkpoint(state, run.folder, so_far.recorder, run.memory, s.keep, s.full_save_every),
        Reporter(so_far.loggers, run.console, bar, watch),
        s,
        run.stopped,
    )
    if watch.why is not None and state.step < s.steps:
        run.notes["stopped_early"] = {"step": state.step, "why": watch.why}
        run.say(f"  ended early at step {state.step}: {watch.why}")
    tested = best.test(run, evaluate, method, so_far.recorder, measure, so_far.rows)
    so_far.dismissed = tested.dismissed
    done = result.of(run, so_far, "done", test=tested.metrics)
    done["numerics"] |= numerics.measured_noise(run, method, measure, batches)
    return done

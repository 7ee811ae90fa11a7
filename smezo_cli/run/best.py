"""Test the best weights of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from smezo_cli.errors import UserError
from smezo_cli.files import atomic, strict_json
from smezo_cli.kinds import MIXTURE
from smezo_cli.methods.base import Method, replays
from smezo_cli.run.begin import Run
from smezo_cli.run.evaluator import Evaluator
from smezo_cli.run.leader import Dismissed, dismiss, hand_out
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.measure import Measure
from smezo_cli.run.replay import rebuild
from smezo_cli.run.rows import Rows
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.store.saved import tensors_digest
from smezo_cli.store.trajectory import Recorder
from smezo_cli.store.values import Metrics
from smezo_cli.tasks import Row


@dataclass(frozen=True)
class Tested:
    """Hold what the best weights made of the test rows.

    Attributes:
        metrics: beside both zero-shots.
        dismissed: what the ranks said when they were let go.
    """

    metrics: Metrics
    dismissed: Dismissed | None


def test(
    run: Run,
    evaluate: Evaluator,
    method: Method,
    recorder: Recorder | None,
    measure: Measure,
    rows: Rows,
) -> Tested:
    """Put the best weights into the model, test them, and let the other ranks go.

    Raises:
        UserError: the checkpoint is not what a run leaves.
        Stopped: asked to, between two batches.
    """
    state, notes, team, dismissed = run.state, run.notes, run.team, None
    if "executor" in notes:
        notes["executor"] = getattr(method, "executor", None)
    if (best := state.best_step) is None:  # dev is evaluated after the last step
        raise UserError(
            f"{run.folder.path}/checkpoint/state.json is not what a run leaves: start over "
            "with if_exists=fresh."
        )
    _put_best(run, evaluate.loaded, method, recorder, best)
    made = getattr(method, "num_steps", 0)
    if team is not None and best != state.step:
        made = 0  # the ranks load these weights, or do not take part
        if not hand_out(run, team, best):  # they do not see the folder
            dismissed, team = dismiss(run, team, measure), None
    evaluate = replace(evaluate, team=team)
    found = evaluate(rows.test, "test", step=best, made=made)
    dev = run.folder.scores_so_far().get("dev")
    shape = (len(rows.dev), *found.scores.shape[1:])
    is_other = found.kind == "classification" and dev is not None and dev.shape != shape
    is_short = found.kind == MIXTURE and dev is not None and len(dev) != len(rows.dev)
    if dev is None or is_other or is_short:  # it was damaged
        dev = evaluate(rows.dev, "dev", step=best, made=made).scores
    if team is not None:
        dismissed = dismiss(run, team, measure)
    test_rows = evaluate.loaded.task.test
    return Tested(report(run, found, test_rows, rows.dev, dev), dismissed)


def _put_best(
    run: Run, loaded: Loaded, method: Method, recorder: Recorder | None, best: int
) -> None:
    """Have the model hold the best weights, and the folder too; note what they are."""
    state, folder, known = run.state, run.folder, run.notes.get("weights", {}).get("last")
    # A finished run that cannot be extended has kept its best weights alone.
    is_gone = recorder is None and state.step not in state.weights()
    last = known["sha256"] if is_gone and known else tensors_digest(method.trained)
    if recorder is not None and replays(method):
        records = recorder.trajectory()
        rebuild(loaded, method, folder, state, records, best, run.say)
        if best not in state.weights():
            folder.save_weights(state, best, method.trained, method.snapshot()[0])
    elif best != state.step:
        loaded.set_weights(folder.load_weights(state, best), folder.path)
    run.notes["weights"] = {
        "best": {"step": best, "sha256": tensors_digest(method.trained)},
        "last": {"step": state.step, "sha256": last},
    }
    folder.save_state(state)


def report(
    run: Run,
    found: Evaluation,
    test_rows: Sequence[Row],
    dev_rows: Sequence[Candidates],
    dev_scores: Tensor,
) -> Metrics:
    """Save scores and predictions of the test rows; return their metrics beside both zero-shots.

    Args:
        run: whose rows they are.
        found: what the tested weights made of the test rows.
        test_rows: these rows with their texts, which are kept beside the predictions.
        dev_rows: on which label offsets are fitted.
        dev_scores: of the same weights.
    """
    scores = run.folder.scores_so_far() | {"dev": dev_scores}
    scores |= {"labels": found.labels, "test": found.scores, "outcome.test": found.per_row()}
    run.folder.save_scores(scores)
    lines = [
        strict_json.dumps({"id": row.id, "fields": dict(row.fields)} | line, ensure_ascii=False)
        + "\n"
        for row, line in zip(test_rows, found.predictions(), strict=True)
    ]
    atomic.write_text(run.folder.path / "predictions-test.jsonl", "".join(lines))
    tested = found.figures()
    if (offsets := found.with_scores(dev_rows, dev_scores).fit_offsets()) is not None:
        tested["calibrated_accuracy"] = found.figures(offsets)["accuracy"]
    for name, key in (("zero_shot", "zero_shot"), ("calibrated", "zero_shot_calibrated")):
        if f"outcome.{name}" in scores:
            gain, error = found.gain(scores[f"outcome.{name}"])
            tested[f"over_{key}"] = {"gain": gain, "standard_error": error}
    return tested

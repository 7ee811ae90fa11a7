"""Run a method that takes no steps: what it makes of the model, on dev and test."""

import time
from dataclasses import dataclass, replace

import torch

from smezo_cli.methods.frozen import InContext, LinearProbe, ZeroShot
from smezo_cli.run import zero_shot
from smezo_cli.run.begin import Run
from smezo_cli.run.console import in_words
from smezo_cli.run.evaluate import features
from smezo_cli.run.evaluator import Evaluator
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.loggers import Loggers, logged
from smezo_cli.run.rows import Rows, count_cut
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.scoring.parts import by_part
from smezo_cli.scoring.tokens import token_ids
from smezo_cli.store.notes import Demonstrations, chosen_prompts, noted_demonstrations
from smezo_cli.store.saved import tensors_digest
from smezo_cli.store.trajectory import seconds_between
from smezo_cli.store.values import SavedWeights
from smezo_cli.tasks.mixture import Prompts


@dataclass(frozen=True)
class Asked:
    """Hold what a method without steps made of dev and test."""

    dev: Evaluation
    test: Evaluation


def demonstrate(run: Run, evaluate: Evaluator, method: InContext, rows: Rows) -> Rows:
    """Put demonstrations before every row: those noted, or newly chosen ones; return the rows.

    In a mixture the rows of a part stand behind demonstrations of that part.
    """
    notes, loaded = run.notes, evaluate.loaded
    task, prompt = loaded.task, loaded.prompt(notes["prompt"])
    known = noted_demonstrations(notes)
    for note in chosen_prompts(notes):
        part = note.get("part", "")
        if part in known:
            _show(run, loaded, part, known[part])
            continue
        chosen = _chosen(run, loaded, method, rows, part)
        if part:
            notes.setdefault("demonstrations_of", {})[part] = chosen
        else:
            notes["demonstrations"] = chosen
        _show(run, loaded, part, chosen)
    if len(known) < len(noted_demonstrations(notes)):  # behind them a row is computed differently
        zero_shot.choose_batching(run, loaded, again=True)
        run.folder.save_state(run.state)
    dev, test = (loaded.encode(of, prompt) for of in (task.dev, task.test))
    behind = replace(rows, train=[], dev=dev, test=test)
    count_cut(run, behind)
    return behind


def _show(run: Run, loaded: Loaded, part: str, note: Demonstrations) -> None:
    run.say(
        f"  {f'{part}: ' if part else ''}{note['used']} of {note['asked']} demonstrations before "
        f"every row, {note['tokens']} tokens"
    )
    loaded.demonstrate(note["text"], part)


def _chosen(run: Run, loaded: Loaded, method: InContext, rows: Rows, part: str) -> Demonstrations:
    """Choose the demonstrations of a task, or of a part, among its training rows."""
    node, prompt = loaded.node_of(part), loaded.prompt(run.notes["prompt"])
    if isinstance(prompt, Prompts):
        prompt = prompt.parts[part]
    limit = loaded.max_length
    if node["kind"] == "generation":
        limit -= node["max_new_tokens"]
    kept = {c.id for c in rows.train}
    of_train = [row for row in by_part(loaded.task.train)[part] if row.id in kept]
    return method.choose(  # type: ignore[return-value]  # plain values
        [(row.id, prompt.candidates(row)[max(0, row.label)]) for row in of_train],
        lambda text: len(token_ids(loaded.tokenizer, [text])[0]),
        limit,
        max(c.width for c in (*rows.dev, *rows.test) if c.part == part),
    )


def probe(run: Run, evaluate: Evaluator, method: LinearProbe, rows: Rows) -> None:
    """Score by a probe from here on: the one that is saved, or one fitted on the train rows."""
    state, folder, loaded = run.state, run.folder, evaluate.loaded
    if 0 in state.weights():
        loaded.set_probe(folder.load_weights(state, 0), folder.path)
        return
    run.say(f"  hidden states of {len(rows.train)} training rows, then the fit")
    part = evaluate.part(rows.train, "train")
    start, before = time.perf_counter(), part.seconds
    try:
        states = features(loaded.scorer, rows.train, run.stopped, part)
    finally:
        part.seconds = before + seconds_between(start, time.perf_counter())
    start = time.perf_counter()
    run.stop.patient = False  # nothing of a fit is kept before it is there
    labels = torch.tensor([c.label for c in rows.train])
    fitted = method.fit(states, labels, len(rows.train[0].full))
    run.stop.patient = True
    state.train_seconds = part.seconds + seconds_between(start, time.perf_counter())
    state.num_forwards = part.num_forwards
    run.notes["num_trained"] = sum(t.numel() for t in fitted.values())
    note: SavedWeights = {"step": 0, "sha256": tensors_digest(fitted)}
    run.notes["weights"] = {"best": note, "last": note}
    folder.save_weights(state, 0, fitted, {})
    folder.save_state(state)
    evaluate.partial.forget()
    loaded.scorer.probe = fitted


def ask(
    run: Run,
    evaluate: Evaluator,
    method: ZeroShot | InContext | LinearProbe,
    rows: Rows,
    dev: Evaluation | None,
    test: Evaluation | None,
) -> Asked:
    """Evaluate dev and test, unless the method is the zero-shot that found `dev` and `test`.

    Args:
        run: that notes what the method makes of dev.
        evaluate: evaluates the rows.
        method: of the run.
        rows: dev and test.
        dev: as the model comes; None: it was not evaluated.
        test: the same.
    """
    if not isinstance(method, ZeroShot):
        dev = test = None
    asked = Asked(dev or evaluate(rows.dev, "dev"), test or evaluate(rows.test, "test"))
    state, of_dev = run.state, asked.dev.figures()
    state.best_step, state.best_loss, run.notes["best_look"] = 0, of_dev["loss"], of_dev
    state.metrics_bytes = 0  # of the one record, which a start before this may have written
    return asked


def log_dev(run: Run, dev: Evaluation, loggers: Loggers) -> None:
    """Log and say what the method makes of dev: the one record of such a run."""
    state, of_dev = run.state, run.notes["best_look"]
    loggers.log({"step": 0} | logged("dev", of_dev))
    state.metrics_bytes, state.metrics_sha256 = loggers.standing()
    run.say(f"  dev {dev.metric} {of_dev[dev.metric]:.4f}  dev loss {of_dev['loss']:.4f}")
    if line := in_words(of_dev, dev.metric):
        run.say(f"      {line}")

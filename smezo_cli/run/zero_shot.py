"""Ask the model as it comes: choose the prompt and fit label offsets on dev, score the test."""

from typing import Any

import torch

from smezo_cli.config.fixed import is_frozen
from smezo_cli.run.begin import Run
from smezo_cli.run.evaluator import Evaluator
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.rows import Rows
from smezo_cli.scoring import metrics
from smezo_cli.scoring.batching import Found
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.store.values import Metrics
from smezo_cli.store.values import Prompt as PromptNote
from smezo_cli.tasks.base import one_class


def choose_batching(run: Run, loaded: Loaded, again: bool = False) -> None:
    """Decide by measuring which rows share a forward; a run that goes on keeps to it.

    Args:
        run: that notes it.
        loaded: task and model.
        again: measure once more, and keep apart what either measurement does.
    """
    notes = run.notes
    found = Found.of(notes["batching"]) if "batching" in notes else Found()
    if again or "batching" not in notes:
        prompts = [loaded.prompts[notes["prompt"]]] if "prompt" in notes else loaded.prompts
        found = found.stricter(loaded.measure_batching(prompts))
        notes["batching"] = found.plain()
    found.to(loaded.scorer)
    if run.team is not None:
        run.team.tell("batching", found=found.plain())
    if found.line:
        run.say(found.line)


def choose_prompt(run: Run, evaluate: Evaluator) -> Evaluation | None:
    """Note the prompt with the best metric on dev; of classification with a threshold fitted there.

    Returns:
        Dev under that prompt; None where nothing was evaluated, as one prompt needs no choice or
        an earlier start has chosen.
    """
    notes, s, loaded = run.notes, run.settings, evaluate.loaded
    if "prompt" in notes:
        return None
    prompts, kind = loaded.prompts, loaded.task.kind
    if s.zero_shot:
        run.say("zero-shot:" if is_frozen(s.method) else "zero-shot, before training:")
    calibrates = s.zero_shot and kind == "classification"
    best: tuple[tuple[float, float], int, Evaluation] | None = None
    for k, prompt in enumerate(prompts):
        note: PromptNote = {
            "template": prompt.template,
            "labels": list(prompt.labels),
            "option": prompt.option,
        }
        if prompt.sfc is not None:
            note["sfc"] = prompt.sfc
        if len(prompts) > 1 or calibrates:
            found = evaluate(loaded.encode(loaded.task.dev, prompt), "dev", prompt=k)
            line, of_dev = _noted(found, note)
            rank = (of_dev[found.metric], -of_dev["loss"])
            if best is None or rank > best[0]:
                best = rank, k, found
            words = f" {'/'.join(prompt.labels)}" if prompt.labels else ""
            run.say(f"{line}  {prompt.template!r}{words}")
        notes.setdefault("prompts", []).append(note)
    notes["prompt"] = 0 if best is None else best[1]
    if len(prompts) > 1:
        run.say(f"  chosen on dev: {prompts[notes['prompt']].template!r}")
    return None if best is None else best[2]


def _noted(found: Evaluation, note: PromptNote) -> tuple[str, Metrics]:
    """Note what a prompt gave on dev; return a line, and the metrics that it is chosen by."""
    note["dev"] = of_dev = found.figures()
    line = f"  dev {of_dev[found.metric]:.4f}"
    # Of one class alone any offset that favours it is right in all rows.
    if found.kind == "classification" and not one_class(found.labels.tolist()):
        offsets = metrics.fit_offsets(found.scores, found.labels)
        note["dev_calibrated"] = of_dev = found.figures(offsets)
        note["offsets"] = offsets.tolist()
        line += f", calibrated {of_dev[found.metric]:.4f}"
    return line, of_dev


def measure(run: Run, evaluate: Evaluator, rows: Rows) -> Evaluation | None:
    """Score the test rows, and note their metrics and the dev loss that a run may be stopped by.

    Returns:
        Test; None where it was not evaluated, as an earlier start has done that or nobody asked.
    """
    notes, folder, s = run.notes, run.folder, run.settings
    scores, found = folder.load_scores(), None
    of_rows = [of for name, of in scores.items() if name.startswith("outcome.")]
    fits = all(of.shape == (len(rows.test),) for of in of_rows) and "outcome.zero_shot" in scores
    if s.zero_shot and (not fits or "zero_shot" not in notes):
        found = evaluate(rows.test, "test")
        scores = {"zero_shot": found.scores, "outcome.zero_shot": found.per_row()}
        notes["zero_shot"] = found.figures()
        _say_test(run, notes["zero_shot"], found.metric, "")
        note = notes["prompts"][notes["prompt"]]
        if "offsets" in note:
            offsets = torch.tensor(note["offsets"])
            notes["zero_shot_calibrated"] = found.figures(offsets)
            scores["outcome.calibrated"] = found.per_row(offsets)
            _say_test(run, notes["zero_shot_calibrated"], found.metric, ", calibrated on dev")
        folder.save_scores(scores | {"labels": found.labels})
        folder.save_state(run.state)
    if s.stop_if_diverged is not None and "dev_loss_before" not in notes:
        note = notes["prompts"][notes["prompt"]]
        before = note.get("dev") or evaluate(rows.dev, "dev").figures()
        notes["dev_loss_before"] = before["loss"]
        folder.save_state(run.state)
    evaluate.partial.forget()
    return found


def _say_test(run: Run, of_test: dict[str, Any], metric: str, words: str) -> None:
    run.say(f"  test {of_test[metric]:.4f} +- {of_test['standard_error']:.4f}{words}")

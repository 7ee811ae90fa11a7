"""Ask the model as it comes: choose the prompt and fit label offsets on dev, score the test."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from smezo_cli.config.fixed import is_frozen
from smezo_cli.run import kept_inputs
from smezo_cli.run.begin import Run
from smezo_cli.run.console import in_words
from smezo_cli.run.evaluate import lots
from smezo_cli.run.evaluator import Evaluator
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.rows import Rows
from smezo_cli.scoring.batching import Found
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.scoring.metrics import paired_gain
from smezo_cli.scoring.mixture import MixedEvaluation
from smezo_cli.scoring.parts import by_part
from smezo_cli.store.notes import Notes, chosen_prompts
from smezo_cli.store.values import LeftOut, Metrics
from smezo_cli.store.values import Prompt as PromptNote
from smezo_cli.tasks import Prompt

_CLEARLY = 2.0  # standard errors by which a prompt is worse, to be left out


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
        chosen = notes.get("prompt", range(len(loaded.prompts)))
        prompts = [loaded.prompts[k] for k in ([chosen] if isinstance(chosen, int) else chosen)]
        found = found.stricter(loaded.measure_batching(prompts))
        notes["batching"] = found.plain()
    found.to(loaded.scorer)
    if run.team is not None:
        run.team.tell("batching", found=found.plain())
    if found.line:
        run.say(found.line)


def choose_prompt(run: Run, evaluate: Evaluator) -> Evaluation | None:
    """Note the prompt with the best metric on dev; of classification with a threshold fitted there.

    Of a mixture the prompt of each part is chosen as that of a task of its own.

    Returns:
        Dev under that prompt; None where nothing was evaluated, as one prompt needs no choice or
        an earlier start has chosen.
    """
    notes, s, loaded = run.notes, run.settings, evaluate.loaded
    if "prompt" in notes:
        return None
    if s.zero_shot:
        run.say("zero-shot:" if is_frozen(s.method) else "zero-shot, before training:")
    notes["prompts"] = []  # of a choice that was stopped nothing is left
    chosen, found = list[int](), dict[str, Evaluation]()
    for part, of_part in by_part(loaded.prompts).items():
        number, dev = _choose(run, evaluate, of_part)
        chosen.append(number)
        if dev is not None:
            found[part] = dev
    if not loaded.task.parts:
        notes["prompt"] = chosen[0]
        return found.get("")
    notes["prompt"] = chosen
    complete = len(found) == len(chosen)
    return MixedEvaluation.of(found, loaded.task.weights) if complete else None


def _choose(
    run: Run, evaluate: Evaluator, prompts: Sequence[Prompt]
) -> tuple[int, Evaluation | None]:
    """Note the prompts of a task or a part; return the number of the best one, and dev under it."""
    notes, s, loaded = run.notes, run.settings, evaluate.loaded
    part = prompts[0].part
    rows = by_part(loaded.task.dev)[part]
    calibrates = s.zero_shot and loaded.node_of(part)["kind"] == "classification"
    first = len(notes["prompts"])
    name = f" {part}" if part else ""
    best: tuple[tuple[float, float], int, Evaluation] | None = None
    encoded = {k: loaded.encode(rows, prompt) for k, prompt in enumerate(prompts, first)}
    begun = _first_lot(evaluate, encoded)
    left_out = _left_out(begun)
    for k, prompt in enumerate(prompts, first):
        note: PromptNote = {
            "template": prompt.template,
            "labels": list(prompt.labels),
            "option": prompt.option,
        }
        if prompt.sfc is not None:
            note["sfc"] = prompt.sfc
        if part:
            note["part"] = part
        words = f" {'/'.join(prompt.labels)}" if prompt.labels else ""
        if k in left_out:
            kept_inputs.forget(loaded, kept_inputs.name_of("dev", part, k))
            line, _ = _noted(begun[k], note)
            note["left_out"] = behind = left_out[k]
            run.say(
                f"  dev{name} {line}  {prompt.template!r}{words}, on {behind['rows']} rows: left "
                f"out, {behind['gain']:.4f} +- {behind['standard_error']:.4f} behind"
            )
        elif len(prompts) > 1 or calibrates:
            asked = [begun[k]] if k in begun else []
            asked.append(evaluate(encoded[k], "dev", prompt=k, lot=slice(len(asked), None)))
            found = Evaluation.joined(asked)
            line, of_dev = _noted(found, note)
            rank = _rank(of_dev, found.metric)
            is_best = best is None or rank > best[0]
            if best is not None:
                worse = best[1] if is_best else k
                kept_inputs.forget(loaded, kept_inputs.name_of("dev", part, worse))
            if is_best:
                best = rank, k, found
            run.say(f"  dev{name} {line}  {prompt.template!r}{words}")
        notes["prompts"].append(note)
    number = first if best is None else best[1]
    if len(prompts) > 1:
        run.say(f"  chosen on dev{name}: {prompts[number - first].template!r}")
    return number, None if best is None else best[2]


def _first_lot(
    evaluate: Evaluator, encoded: Mapping[int, Sequence[Candidates]]
) -> dict[int, Evaluation]:
    """Return the first rows of dev under each prompt; nothing where all rows are of one lot."""
    rows = next(iter(encoded.values()))
    if len(lots(evaluate.run.settings, evaluate.loaded.prompts, "dev", rows)) == 1:
        return {}
    return {k: evaluate(of, "dev", prompt=k, lot=slice(0, 1)) for k, of in encoded.items()}


def _left_out(begun: Mapping[int, Evaluation]) -> dict[int, LeftOut]:
    """Return the prompts that are clearly worse than the best one on the first rows, and by what.

    The rows are the same, so the difference is paired. Offsets are fitted under each prompt alone.
    """
    known = {k: found.per_row().isfinite() for k, found in begun.items()}
    if not begun or not all(of.any() for of in known.values()):
        return {}  # of rows without labels nothing is known
    offsets = {k: found.fit_offsets() for k, found in begun.items()}
    ranks = {k: _rank(found.figures(offsets[k]), found.metric) for k, found in begun.items()}
    best = max(begun, key=lambda k: ranks[k])
    of_best, found = begun[best].per_row(offsets[best]), dict[int, LeftOut]()
    for k, other in begun.items():
        both = known[best] & known[k]
        gain, error = paired_gain(of_best[both], other.per_row(offsets[k])[both])
        if k != best and gain > _CLEARLY * error:
            found[k] = {"rows": len(both), "gain": gain, "standard_error": error}
    return found


def _rank(of_dev: Metrics, metric: str) -> tuple[float, float]:
    return of_dev[metric], -of_dev["loss"]


def _noted(found: Evaluation, note: PromptNote) -> tuple[str, Metrics]:
    """Note what a prompt gave on dev; return a line, and the metrics that it is chosen by."""
    note["dev"] = of_dev = found.figures()
    line = f"{of_dev[found.metric]:.4f}"
    if (offsets := found.fit_offsets()) is not None:
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
        if (offsets := _noted_offsets(notes)) is not None:
            notes["zero_shot_calibrated"] = found.figures(offsets)
            scores["outcome.calibrated"] = found.per_row(offsets)
            _say_test(run, notes["zero_shot_calibrated"], found.metric, ", calibrated on dev")
        folder.save_scores(scores | {"labels": found.labels})
        folder.save_state(run.state)
    if s.stop_if_diverged is not None and "dev_loss_before" not in notes:
        notes["dev_loss_before"] = _dev_loss(run, evaluate, rows)
        folder.save_state(run.state)
    evaluate.partial.forget()
    return found


def _noted_offsets(notes: Notes) -> Any:
    """Return the label offsets of the chosen prompt, or of those of the parts that have some."""
    found = {
        note.get("part", ""): torch.tensor(note["offsets"])
        for note in chosen_prompts(notes)
        if "offsets" in note
    }
    return found.get("", found or None)


def _dev_loss(run: Run, evaluate: Evaluator, rows: Rows) -> float:
    """Return the dev loss before training: as the choice of the prompt found it, or found now."""
    chosen, weights = chosen_prompts(run.notes), evaluate.loaded.task.weights
    if all(note.get("dev") for note in chosen):
        losses = [(weights.get(note.get("part", ""), 1.0), note["dev"]) for note in chosen]
        return math.fsum(weight * (dev or {})["loss"] for weight, dev in losses)
    return float(evaluate(rows.dev, "dev").figures()["loss"])


def _say_test(run: Run, of_test: dict[str, Any], metric: str, words: str) -> None:
    run.say(f"  test {of_test[metric]:.4f} +- {of_test['standard_error']:.4f}{words}")
    if line := in_words(of_test, metric):
        run.say(f"       {line}")

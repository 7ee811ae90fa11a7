"""Write the README.md of an exported model: the model card that the hub reads."""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load

from smezo_cli.config.mixture import single_tasks
from smezo_cli.config.settings import Settings
from smezo_cli.errors import redacted

#: An absolute path, alone or in a list; not the slashes of a URL, of a hub id or between words.
_PATH = re.compile(r"(?<![\w:/~.}])~?/[^\s,\]\[\"']+")
#: The hub's names of what is done, by kind of task.
_TASKS = {
    "classification": ("text-classification", "Text classification"),
    "choice": ("multiple-choice", "Multiple choice"),
    "generation": ("text-generation", "Text generation"),
    "mixture": ("other", "Several tasks"),
}


def model_card(
    settings: Settings, result: Mapping[str, Any], step: int, *, loaded_by: str, is_adapter: bool
) -> str:
    """Return a model card: metadata of the hub's form, results with their errors, the command.

    Args:
        settings: of the run.
        result: its result.json; {} where there is none. Its test metrics are those of the weights
            that were tested, and stand in the card of these weights alone.
        step: whose weights are exported.
        loaded_by: a line on what loads the folder.
        is_adapter: the folder holds an adapter beside the base model.
    """
    base, data = _hub_id(settings.model), _data_id(settings.task)
    is_tested = result.get("test") is not None and step == _tested_step(result)
    card = ModelCardData(
        model_name=f"{settings.model['name']}-{settings.task['name']}-{settings.method['name']}",
        base_model=base,
        datasets=[data] if data else None,
        license=_license(settings.model),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="fill-mask" if settings.model["family"] == "masked" else "text-generation",
        tags=["smezo", settings.method["name"]],
        metrics=[result["metric"]] if is_tested else None,
        eval_results=_measured(settings, result, data) if is_tested else None,
    )
    lines = _lines(settings, result, step, base=base, loaded_by=loaded_by, is_tested=is_tested)
    return redacted(f"---\n{card.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def _tested_step(result: Mapping[str, Any]) -> int | None:
    """Return the step whose weights were tested."""
    weights = result.get("weights") or {}
    tested = weights.get("best") or weights.get("last") or {}
    step = tested.get("step")
    return step if isinstance(step, int) else None


def _hub_id(model: Mapping[str, Any]) -> str | None:
    """Return the id of the base model on the hub; None where it came from elsewhere."""
    path = model.get("path")
    is_id = isinstance(path, str) and path.count("/") == 1 and not path.startswith((".", "/", "~"))
    return path if is_id and not Path(str(path)).exists() else None


def _data_id(task: Mapping[str, Any]) -> str | None:
    """Return the id of the data set on the hub; None where the rows came from files."""
    if task.get("data_dir") is not None or task.get("data") is not None:
        return None
    hub = (task.get("source") or {}).get("hub") or {}
    path = hub.get("path")
    return path if isinstance(path, str) else None


def _license(model: Mapping[str, Any]) -> str | None:
    """Return the licence that the card of a base model in a local folder names."""
    path = model.get("path")
    card = Path(path) / "README.md" if isinstance(path, str) else None
    if card is None or not card.is_file():
        return None
    try:
        found = (metadata_load(card) or {}).get("license")
    except Exception:  # whatever is wrong with a file of unknown origin
        logging.getLogger(__name__).debug("%s names no licence", card)
        return None
    return found if isinstance(found, str) else None


def _measured(settings: Settings, result: Mapping[str, Any], data: str | None) -> list[EvalResult]:
    """Return the test metric as the hub's leaderboards read it."""
    metric, test = result["metric"], result["test"]
    kinds = {node["kind"] for node in single_tasks(settings.task)}
    task, name = _TASKS[kinds.pop()] if len(kinds) == 1 else _TASKS["mixture"]
    return [
        EvalResult(
            task_type=task,
            task_name=name,
            dataset_type=data or settings.task["name"],
            dataset_name=settings.task["name"],
            dataset_split="test",
            metric_type=metric,
            metric_name=f"{metric}, {test['n']} rows, standard error {test['standard_error']:.4f}",
            metric_value=test[metric],
        )
    ]


def _lines(
    settings: Settings,
    result: Mapping[str, Any],
    step: int,
    *,
    base: str | None,
    loaded_by: str,
    is_tested: bool,
) -> Iterator[str]:
    """Yield the lines below the metadata."""
    model, task, method = settings.model["name"], settings.task["name"], settings.method["name"]
    versions = result.get("versions") or {}
    yield f"# {model} on {task} by {method}"
    yield ""
    yield (
        f"{f'[{base}](https://huggingface.co/{base})' if base else model} after {step} steps of "
        f"method `{method}` on task `{task}`, trained by smezo {versions.get('smezo', '')}".rstrip()
        + "."
    )
    if result.get("command"):
        yield from ("", "```bash", _without_paths(str(result["command"])), "```")
    if is_tested:
        yield ""
        yield from _table(result)
    else:
        yield from ("", "These weights were not tested.")
    yield from _prompts(result.get("prompt"))
    yield from ("", f"{loaded_by[0].upper()}{loaded_by[1:]}.")
    yield from ("", "The licence of the base model holds for these weights, too.")


def _prompts(found: Any) -> Iterator[str]:
    """Yield the prompt of the run, or those of the parts of a mixture."""
    for prompt in [found] if isinstance(found, Mapping) else found or ():
        of = f" of part {prompt['part']}" if "part" in prompt else ""
        yield from ("", f"Prompt{of}:", "", "```", str(prompt["template"]), "```")
        if prompt.get("labels"):
            yield from ("", f"Label words: {', '.join(map(str, prompt['labels']))}.")


def _without_paths(command: str) -> str:
    """Return a command with names of files in place of absolute paths of this machine."""
    return _PATH.sub(lambda found: Path(found[0]).name, command)


def _table(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the metric before and after training, with standard errors."""
    metric, test = result["metric"], result["test"]
    yield f"| {test['n']} test rows, seed {result.get('seed')} | {metric} | standard error |"
    yield "|---|---|---|"
    for what, found in (
        ("before training", result.get("zero_shot")),
        ("before training, calibrated on dev", result.get("zero_shot_calibrated")),
        ("after training", test),
    ):
        if found:
            yield f"| {what} | {found[metric]:.4f} | {found['standard_error']:.4f} |"
    if gain := test.get("over_zero_shot"):
        words = f"{gain['gain']:+.4f} +- {gain['standard_error']:.4f}"
        yield from ("", f"Gain over the model before training, paired by row: {words}.")

"""`smezo show run RUN`: what came of a run, and below it the settings."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from smezo_cli.errors import UserError, meant
from smezo_cli.files import bounded
from smezo_cli.report.runs import Run, find, load


def text(word: str) -> str:
    """Return what result.json of a run says, as comments, and its config.yaml.

    Args:
        word: its folder, or a part of the folder's name that no other run below runs/ has.

    Raises:
        UserError: no run, or several, are called so.
    """
    run = load(Path(word)) or _named(word)
    settings = bounded.read_text(run.path / "config.yaml", 1 << 24)
    facts = "\n".join(_facts(run)).splitlines()  # a prompt or an error may be of several lines
    said = "".join(f"# {line}".rstrip() + "\n" for line in facts)
    return f"# {run.path}\n{said}\n{settings.rstrip()}\n"


def _named(word: str) -> Run:
    runs = find(Path("runs")) if Path("runs").is_dir() else []
    found = [run for run in runs if run.path.name == word]
    found = found or [run for run in runs if word in str(run.path)]
    if len(found) == 1:
        return found[0]
    names = [str(run.path) for run in found or runs]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(f"{word} fits {len(found)} runs: {', '.join(names[:3])}{more}.")
    raise UserError(f"there is no run {word}{meant(word, names)} (smezo runs lists all).")


def _facts(run: Run) -> Iterator[str]:
    """Yield what came of a run, a line a fact; facts that it does not have are left out."""
    result = run.result
    steps = f" at step {result.get('step', 0)} of {result['steps']}" if "steps" in result else ""
    yield f"status: {result['status']}{steps}"
    if result["status"] in ("failed", "diverged") and result.get("error"):
        yield f"error: {result['error']}"
    for name in ("zero_shot", "zero_shot_calibrated", "test"):
        if (scored := result.get(name)) and run.metric in scored:
            yield f"{name.replace('_', ' ')}: {_score(scored, run.metric)}"
    best = (result.get("dev") or {}).get("best") or {}
    if run.metric in best:
        yield f"best on dev: {_score(best, run.metric)}, step {best['step']}"
    prompts = result.get("prompt") or []
    for prompt in prompts if isinstance(prompts, list) else [prompts]:  # of a mixture, several
        part = f" of {prompt['part']}" if "part" in prompt else ""
        yield f"prompt{part}: {prompt.get('template')!r}"
    if layer := result.get("dominant_layer"):
        yield (
            f"dominant layer: block {layer['block']} of {layer['num_blocks']}, the first whose "
            f"output has an entry above {layer['factor']:g} times its median "
            f"({layer['ratio']:.3g} times)"
        )
    if result.get("num_trained"):
        yield f"trained: {result['num_trained']:,} weights"
    if result.get("executor"):
        yield f"executor: {result['executor']}"
    if result.get("num_forwards") is not None and result.get("train_seconds") is not None:
        yield f"training: {result['num_forwards']} forwards, {result['train_seconds']:.1f} s"
    if result.get("peak_memory_bytes"):
        yield f"peak memory: {result['peak_memory_bytes'] / 2**30:.2f} GiB"
    if result.get("device"):
        yield f"device: {result['device']}"
    if result.get("command"):
        yield f"command: {result['command']}"


def _score(scored: Mapping[str, Any], metric: str) -> str:
    """Return a metric with its standard error and the number of rows."""
    error = scored.get("standard_error")
    spread = "" if error is None else f" +- {error:.4f}"
    rows = f" (n={scored['n']})" if "n" in scored else ""
    return f"{metric} {scored[metric]:.4f}{spread}{rows}"

"""`smezo replay`: make the weights of a run again from its trajectory, and compare."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from smezo_cli.cli.export import shown_bytes
from smezo_cli.cli.flags import Flags, shows_help
from smezo_cli.config.method_keys import trait
from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError
from smezo_cli.files.bounded import parse_yaml
from smezo_cli.machine import streams
from smezo_cli.machine.waiting import waiting
from smezo_cli.run.trained import (
    SAME_BITS,
    as_prompt,
    batch,
    encode_rows,
    kept_beside,
    parsed,
    read_config,
    replayed,
    save_model,
    say_code,
    score_rows,
)
from smezo_cli.store.schema import is_batching, is_known, is_prompt

if TYPE_CHECKING:
    from smezo_cli.store.trajectory import Trajectory
    from smezo_cli.tasks import Prompt
    from smezo_cli.tasks.mixture import Prompts


USAGE = """\
smezo replay RUN [KEY=VALUE ...]    the trained weights again, from base model and trajectory alone
smezo replay FILE [KEY=VALUE ...]   the same from a delta (smezo export RUN FILE --delta)

    --step N          the weights after so many steps (default: the best; of a delta its last)
    --split SPLIT     what they are scored on: test (default), dev or none
    --out FOLDER      save the model there, as transformers loads it
Prints the SHA-256 of the weights and the metrics, and whether they are those of the run; if not,
the exit code is 1. KEY=VALUE as for smezo eval; of a delta model.path and model.revision, too.
Examples:
  smezo replay runs/default/toy-tiny-llama-mezo-s0-0123abcd
  smezo replay my.delta --out my-model
"""


def main(words: Sequence[str]) -> int:
    """Make the weights again from base model and trajectory; return 1 if they differ, else 0.

    Raises:
        UserError: a mistake on the line, a file that is damaged or of another model or method.
    """
    if shows_help(words, USAGE):
        return 0
    from smezo_cli.store.delta import is_delta

    parser = Flags("replay")
    parser.add_argument("source")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--step", type=int)
    parser.add_argument("--split", choices=("test", "dev", "none"), default="test")
    parser.add_argument("--out")
    given = parser.parse_intermixed_args(list(words))
    if given.out is not None and Path(given.out).exists():
        raise UserError(f"--out {given.out} is there already: name a new folder.")
    streams.outlast()  # a closed pipe ends nothing: the exit code tells the result, too
    find = _of_delta if is_delta(Path(given.source)) else _of_run
    cfg, settings, records, prompt, known = find(given.source, given.overrides)
    step = known["step"] if given.step is None else given.step
    if not 0 <= step <= len(records):
        raise UserError(f"--step {step}: {given.source} holds {len(records)} good steps.")
    same = _replay(given, cfg, settings, records, prompt, known, step)
    return 0 if same else 1


def _replay(
    given: argparse.Namespace,
    cfg: DictConfig,
    settings: Settings,
    records: "Trajectory",
    prompt: "Prompt | Prompts",
    known: Mapping[str, Any],
    step: int,
) -> bool:
    """Apply the steps, score the weights, and return whether all is as the run recorded it."""
    import time

    from smezo_cli.machine.device import choose_device
    from smezo_cli.run import mask
    from smezo_cli.run.console import Console
    from smezo_cli.run.loaded import Loaded
    from smezo_cli.store.saved import tensors_digest
    from smezo_cli.store.trajectory import replay as apply

    console = Console()
    device = choose_device(settings.device, settings.model["device_map"])
    say_code(settings, console.say)
    job = Loaded(settings, device, console.say, with_rows=given.split != "none")
    same_task = not any(word.startswith("task.") for word in given.overrides)
    mask.use(job, Path(given.source))
    method = replayed(job, records, given.source)
    if given.split != "none":  # before the steps, as in the run
        encode_rows(job, getattr(job.task, given.split)[:1], prompt, given.source)
        batch(job, prompt, known.get("batching") if same_task else None, None, console.say)
    start = time.perf_counter()
    apply(method, records, step)
    spent = time.perf_counter() - start
    each = f" ({spent / step:.3g} s a step)" if step else ""
    console.say(f"{given.source}: {step} steps applied in {spent:.3g} s{each}")
    found, wanted = tensors_digest(method.trained), known["weights"].get(step)
    same = wanted in (None, found)
    what = "none was recorded at this step" if wanted is None else _said(same)
    console.say(f"  weights sha256 {found}: {what}")
    if given.out is not None:
        size = save_model(job, Path(given.out), cfg, {}, step)
        console.say(f"  {given.out}: {shown_bytes(size)}")
    if given.split == "none":
        return same
    of_run = {given.split: records.header.get("rows", {}).get(given.split, "")}
    if same_task and job.differing_rows(of_run):
        raise UserError(
            f"the {given.split} rows are not those of {given.source}: the data has changed since; "
            "put it back, say which to use (such as task.data=FILE), or add --split none."
        )
    rows = getattr(job.task, given.split)
    encoded = encode_rows(job, rows, prompt, given.source)
    beside = Path(given.source) / "replay" if Path(given.source).is_dir() else Path(given.source)
    kept = kept_beside(beside, job)
    scored = score_rows(job, encoded, given.split, console, kept, step, given.source)
    metrics = scored.figures()
    kept.remove()
    recorded = known[given.split] if step == known["step"] and same_task else None
    what = ""
    if recorded:
        other = [k for k, v in metrics.items() if k in recorded and recorded[k] != v]
        same = same and not other
        what = ": " + (_said(True) if not other else f"{_said(False)} in {', '.join(other)}")
    console.say(
        f"  {given.split} {scored.metric} {metrics[scored.metric]:.4f} +- "
        f"{metrics['standard_error']:.4f} (n={metrics['n']}){what}"
    )
    return same


def _said(same: bool) -> str:
    return "the same as the run's" if same else "NOT the same as the run's"


_Source = tuple[DictConfig, Settings, "Trajectory", "Prompt | Prompts", dict[str, Any]]


def _of_delta(name: str, overrides: Sequence[str]) -> _Source:
    from smezo_cli.store.delta import read_delta
    from smezo_cli.store.trajectory import Damaged

    about, records = read_delta(Path(name))
    # The base model may lie elsewhere here; and trust of the delta's maker is not the user's.
    with_path = ("model.path", "model.revision", "model.trust_remote_code", *SAME_BITS)
    cfg, settings = parsed(parse_yaml(str(about.get("config")), Path(name)), overrides, with_path)
    trusted = "model.trust_remote_code=true"
    if settings.model.get("trust_remote_code") and trusted not in overrides:
        raise UserError(
            f"{name}: its model brings Python files, which would run with all your rights; if you "
            f"trust them, add {trusted}."
        )
    if trait(settings.method, "needs_mask", default=False):
        raise UserError(
            f"{name}: the steps of method {settings.method['name']} need the mask of the run, "
            "which a delta does not hold: replay the folder of the run."
        )
    noted, metrics = about.get("weights"), {key: about.get(key) for key in ("test", "dev")}
    if (
        not isinstance(noted, dict)
        or not is_known(noted.get("step"), noted.get("sha256"), list(metrics.values()))
        or not is_prompt(about.get("prompt"))
        or not is_batching(about.get("batching"))
        or about["step"] > settings.steps
    ):
        raise Damaged(f"{name} is damaged: get it anew.")
    known = {"step": about["step"], "weights": {noted["step"]: noted["sha256"]}, **metrics}
    known["batching"] = about.get("batching")
    return cfg, settings, records, as_prompt(about["prompt"]), known


def _of_run(name: str, overrides: Sequence[str]) -> _Source:
    with waiting("loading torch and transformers"):
        from smezo_cli.run.layers import resolved
        from smezo_cli.store.folder import RunFolder
        from smezo_cli.store.trajectory import read

    path = Path(name)
    cfg, settings = read_config(path, overrides, SAME_BITS)
    if not (path / "trajectory.bin").exists():
        raise UserError(
            f"{name} has no trajectory.bin, as only the runs of zeroth-order methods have."
        )
    records = read(path / "trajectory.bin")
    folder = RunFolder(path, to_read=True)
    try:
        result = folder.result() or {}
    finally:
        folder.close()
    if result.get("prompt") is None:
        raise UserError(f"{name} has no good result.json yet: finish it with smezo train.")
    settings = resolved(settings, result.get("dominant_layer"))
    best = (result.get("dev") or {}).get("best") or {}
    noted = (result.get("weights") or {}).values()
    known = {
        "step": best.get("step") if best.get("step") is not None else len(records),
        "weights": {note["step"]: note["sha256"] for note in noted},
        **{"test": result.get("test"), "dev": best, "batching": result.get("batching")},
    }
    return cfg, settings, records, as_prompt(result["prompt"]), known

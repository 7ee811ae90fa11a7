"""Verbs on a run that has been trained: `smezo eval`, `smezo predict`, `smezo export`."""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from smezo_cli.errors import UserError
from smezo_cli.intake import load_yaml
from smezo_cli.redaction import redacted
from smezo_cli.settings import Settings, check, near, sentence

if TYPE_CHECKING:
    from smezo_cli.job import Job
    from smezo_cli.runs import RunFolder, State
    from smezo_cli.tasks import Prompt

USAGE = {
    "eval": """\
smezo eval RUN [KEY=VALUE ...]     score a trained run again and save every prediction

    --split SPLIT     test (default), dev or train
    --base            the model as it was before training
    --step N          the weights of that step, of a run with keep=all (default: the best)
    --out FILE        where the predictions go, one JSON object a line (default: in the run folder)
KEY=VALUE changes settings of the task and the machine, such as task.num_test=100 or device=cpu.
Examples:
  smezo eval runs/default/toy-tiny-llama-mezo-s0-0123abcd --split dev
  smezo eval RUN --base --out before.jsonl
""",
    "predict": """\
smezo predict RUN FILE [KEY=VALUE ...]    predict rows of your own, without labels
smezo predict RUN --field NAME=TEXT [--field ...]     or one row given here

    --out FILE        where the predictions go, one JSON object a line (default: standard output)
FILE is CSV, TSV, JSONL, JSON or Parquet with a column for each field of the run's prompt.
Examples:
  smezo predict RUN new.csv --out predictions.jsonl
  smezo predict RUN --field text="a joy from start to end"
""",
    "export": """\
smezo export RUN FOLDER             the trained model and its tokenizer, as transformers loads them

    --step N          the weights of that step, of a run with keep=all (default: the best)
Example:
  smezo export RUN my-model
  smezo train model=own model.path=my-model
""",
}


def main(verb: str, words: Sequence[str]) -> int:
    """Run `eval`, `predict` or `export`; returns the exit code.

    Raises:
        UserError: a mistake on the line, or a run that cannot be used.
    """
    if "--help" in words or "-h" in words:
        print(USAGE[verb], end="")
        return 0
    return {"eval": evaluate, "predict": predict, "export": export}[verb](words)


# Settings that may differ from those of the training: of the task, what rows there are.
_MAY_CHANGE = ("task", "device", "dtype", "compute_dtype")
_OF_THE_TRAINING = ("name", "kind", "source", "prompt", "prompts", "masked", "option_template")


class _Flags(argparse.ArgumentParser):
    def __init__(self, verb: str) -> None:
        super().__init__(prog=f"smezo {verb}", add_help=False, allow_abbrev=False)
        self.verb = verb

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; smezo {self.verb} --help shows the flags.")


@contextlib.contextmanager
def _opened(
    run: str, overrides: Sequence[str] = ()
) -> Iterator[tuple["RunFolder", "State", Settings, DictConfig]]:
    """A trained run: its folder (locked), its state, its settings with some changed."""
    from smezo_cli.runs import RunFolder

    path = Path(run)
    if not (path / "config.yaml").is_file():
        there = "has no config.yaml" if path.is_dir() else "is not there"
        raise UserError(f"{run} {there}: give the folder of a run (smezo runs lists them).")
    cfg = load_yaml(path / "config.yaml")
    for word in overrides:
        _change(cfg, word)
    settings = check(cfg)
    folder = RunFolder(path)
    try:
        state = folder.load_state()
        needed = {"prompts", "prompt", "rows"}
        if state is None or state.best_step is None or not needed <= state.notes.keys():
            raise UserError(f"{path} has no trained weights yet: finish it with smezo train.")
        yield folder, state, settings, cfg
    finally:
        folder.close()


def _change(cfg: DictConfig, word: str) -> None:
    """Apply one KEY=VALUE to the settings of the run.

    Raises:
        UserError: not of that form, no such key, or one that must stay as it was trained.
    """
    key, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"{shlex.quote(word)} is not of the form KEY=VALUE, such as device=cpu.")
    top, *inside = key.split(".")
    if top not in _MAY_CHANGE or key == "task" or (inside and inside[0] in _OF_THE_TRAINING):
        raise UserError(
            f"{key}: a trained run keeps this setting; what may change is which rows it sees (such "
            "as task.num_test or task.data_dir), device, dtype and compute_dtype."
        )
    parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
    name = key.rpartition(".")[2]
    if not isinstance(parent, DictConfig) or name not in parent:
        options = list(parent) if isinstance(parent, DictConfig) else []
        raise UserError(f"there is no setting {key}{near(name, map(str, options))}.")
    try:
        OmegaConf.update(cfg, key, OmegaConf.create(f"value: {value}").value)
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"cannot read {shlex.quote(word)}: {sentence(error)}.") from error


def _trained(folder: "RunFolder", state: "State", job: "Job", step: int | None) -> int:
    """Put the trained weights into the model; the step that they are of."""
    if step is not None and not folder.has_weights(step):
        steps = ", ".join(map(str, folder.steps_kept()))
        raise UserError(
            f"--step {step}: {folder.path} keeps the weights of step {steps}; "
            "a run with keep=all keeps those of every look at dev."
        )
    chosen = state.best_step if step is None else step
    assert chosen is not None  # _opened refuses a run without
    job.set_weights(folder.load_weights(chosen), folder.path)
    return chosen


def _prompt(state: "State") -> "Prompt":
    """The prompt that was trained with."""
    from smezo_cli.tasks import Prompt

    trained = state.notes["prompts"][state.notes["prompt"]]
    return Prompt(trained["template"], tuple(trained["labels"]), trained["option"])


def _check_model(state: "State", job: "Job", overrides: Sequence[str], run: str) -> None:
    """Trained tensors belong on the model that they were trained on, frozen ones included."""
    if any(word.startswith("dtype=") for word in overrides):
        return  # the same weights in another dtype have another fingerprint
    if state.notes.get("model") not in (None, job.fingerprint()):
        raise UserError(
            f"{run} was trained on another model than {job.settings.model['name']} is now: its "
            "weights on disk or on the hub have changed since."
        )


# --- eval ------------------------------------------------------------------------------------


def evaluate(words: Sequence[str]) -> int:
    """`smezo eval`: prints the figures, writes the predictions; returns the exit code.

    Raises:
        UserError: a mistake on the line, or a run that cannot be evaluated.
    """
    parser = _Flags("eval")
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--split", choices=("test", "dev", "train"), default="test")
    parser.add_argument("--base", action="store_true")
    parser.add_argument("--step", type=int)
    parser.add_argument("--out")
    given = parser.parse_intermixed_args(list(words))
    if given.base and given.step is not None:
        raise UserError("--base and --step exclude each other: give one of them.")
    _check_out(given.out)
    with _opened(given.run, given.overrides) as (folder, state, settings, _):
        from smezo_cli.device import choose_device
        from smezo_cli.job import Job
        from smezo_cli.log import Console
        from smezo_cli.loop import evaluate as evaluate_rows
        from smezo_cli.tasks.base import fingerprint

        device = choose_device(settings.device)
        if given.overrides and given.out is None:
            raise UserError(
                f"{given.overrides[0]}: predictions under other settings need a file of their own: "
                "add --out FILE."
            )
        console = Console()
        job = Job(settings, device, console.say)
        _check_model(state, job, given.overrides, given.run)
        step = 0 if given.base else _trained(folder, state, job, given.step)
        rows = getattr(job.task, given.split)
        same_task = not any(word.startswith("task.") for word in given.overrides)
        if same_task and state.notes["rows"][given.split] != fingerprint(rows):
            raise UserError(
                f"the {given.split} rows are not those that {given.run} was trained with: the data "
                "has changed since; put it back, or say which to use (such as task.data=FILE)."
            )
        encoded = job.encode(rows, _prompt(state))
        bar = console.bar(given.split, len(rows))
        found = evaluate_rows(job.scorer, encoded, bar, lambda: False)
        figures = found.figures()
        which = "-base" if given.base else "" if given.step is None else f"-step{step}"
        name = f"predictions-{given.split}{which}.jsonl"
        out = Path(given.out) if given.out else folder.path / name
        _write_lines(
            out,
            (
                {"id": row.id, "fields": dict(row.fields)} | prediction
                for row, prediction in zip(rows, found.predictions(), strict=True)
            ),
        )
        value = figures[found.metric]
        console.say(
            f"{given.split} {found.metric} {value:.4f} +- {figures['standard_error']:.4f} "
            f"(n={figures['n']}, {'untrained' if given.base else f'step {step}'})"
        )
        for key in ("exact_match", "loss", "auc"):
            if figures.get(key) is not None:
                console.say(f"  {key}  {figures[key]:.4f}")
        console.say(f"  {out}")
    return 0


def _check_out(out: str | None) -> None:
    """Raise UserError, before the work, where the predictions could not be written after it."""
    if out is None:
        return
    path = Path(out)
    if path.is_dir():
        raise UserError(f"--out {out} is a folder: give the file for the predictions.")
    if not path.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {path.parent}; make it first.")


def _write_lines(path: Path, records: Iterator[dict[str, Any]] | Any) -> None:
    """Replace a JSONL file as a whole."""
    from smezo_cli.runs import write_text

    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_text(path, "".join(lines))


# --- export ----------------------------------------------------------------------------------


def export(words: Sequence[str]) -> int:
    """`smezo export`: writes a folder for `from_pretrained`; returns the exit code.

    Raises:
        UserError: a mistake on the line, a folder that is there already, no space.
    """
    parser = _Flags("export")
    parser.add_argument("run")
    parser.add_argument("folder")
    parser.add_argument("--step", type=int)
    given = parser.parse_args(list(words))
    target = Path(given.folder)
    if target.exists():
        raise UserError(f"{target} is there already: name a new folder.")
    with _opened(given.run) as (folder, state, settings, cfg):
        from smezo_cli.job import Job
        from smezo_cli.runs import check_space

        # Weights are copied, not computed with: the CPU will do wherever the run was trained.
        job = Job(settings, "cpu", lambda line: None, with_rows=False)
        _check_model(state, job, [], given.run)
        step = _trained(folder, state, job, given.step)
        size = sum(p.numel() * p.element_size() for p in job.model.parameters())
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            check_space(target.parent, size)
            job.save(partial)
            (partial / "smezo.yaml").write_text(redacted(OmegaConf.to_yaml(cfg)), encoding="utf-8")
            os.replace(partial, target)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        print(f"{target}: {settings.model['name']} after {step} steps, {size / 1e9:.2f} GB")
        family = "Masked" if settings.model["family"] == "masked" else "Causal"
        loads = f"AutoModelFor{family}LM.from_pretrained(FOLDER)"
        print(f"  transformers loads it: {loads}")
    return 0


# --- predict ---------------------------------------------------------------------------------


def predict(words: Sequence[str]) -> int:
    """`smezo predict`: predictions of unlabelled rows as JSONL; returns the exit code.

    Raises:
        UserError: a mistake on the line, in the file, or a run that cannot be used.
    """
    parser = _Flags("predict")
    parser.add_argument("run")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--field", action="append", default=[])
    parser.add_argument("--out")
    given = parser.parse_intermixed_args(list(words))
    files = [word for word in given.words if "=" not in word]
    if len(files) + bool(given.field) != 1:
        raise UserError("give the rows either as one FILE or by --field NAME=TEXT.")
    fields = {}
    for word in given.field:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise UserError(f"--field {shlex.quote(word)} is not of the form NAME=TEXT.")
        fields[name] = text
    overrides = [word for word in given.words if "=" in word]
    _check_out(given.out)
    with _opened(given.run, overrides) as (folder, state, settings, _):
        from smezo_cli.device import choose_device
        from smezo_cli.job import Job
        from smezo_cli.log import Console
        from smezo_cli.loop import evaluate as evaluate_rows
        from smezo_cli.tasks.own import unlabelled

        # What is said goes beside the predictions, never among them; of the rows of the training
        # there is nothing to say.
        console = Console(sys.stdout if given.out else sys.stderr)
        prompt = _prompt(state)
        rows = unlabelled(settings.task, prompt, files[0] if files else fields)
        job = Job(settings, choose_device(settings.device), lambda line: None, with_rows=False)
        _check_model(state, job, overrides, given.run)
        _trained(folder, state, job, None)
        encoded = job.encode(rows, prompt)
        bar = console.bar("predict", len(rows))
        found = evaluate_rows(job.scorer, encoded, bar, lambda: False)
        predictions = [
            {"fields": dict(row.fields)}
            | {key: value for key, value in prediction.items() if value is not None}
            for row, prediction in zip(rows, found.predictions(), strict=True)
        ]
        if given.out:
            _write_lines(Path(given.out), predictions)
            console.say(f"  {given.out}: {len(predictions)} predictions")
        else:
            for prediction in predictions:
                print(json.dumps(prediction, ensure_ascii=False))
    return 0

"""Verbs on a run that has been trained: `smezo eval`, `predict`, `export` and `replay`."""

import argparse
import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from smezo_cli.config.digest import with_later_keys
from smezo_cli.config.fixed import is_frozen, sentence
from smezo_cli.config.settings import Settings, check
from smezo_cli.errors import UserError, near, redacted
from smezo_cli.files import strict_json
from smezo_cli.files.bounded import load_yaml, parse_yaml
from smezo_cli.machine import streams
from smezo_cli.store.schema import is_batching, is_known, is_prompt

if TYPE_CHECKING:
    from smezo_cli.job import Job
    from smezo_cli.log import Console
    from smezo_cli.scoring.evaluation import Evaluation
    from smezo_cli.store.folder import RunFolder, State
    from smezo_cli.store.partial_scores import PartialScores
    from smezo_cli.store.trajectory import Trajectory
    from smezo_cli.tasks import Prompt, Row
    from smezo_cli.zo.optimizer import ZeroOrder

USAGE = {
    "eval": """\
smezo eval RUN [KEY=VALUE ...]     score a trained run again and save every prediction

    --split SPLIT     test (default), dev or train
    --base            the model as it was before training
    --step N          the weights of that step (default: the best): any step of a zeroth-order run,
                      of others those of a look at dev, with keep=all
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
                                    (LoRA merged into the weights; of a prefix peft's adapter)
smezo export RUN FILE --delta       one small file, from which smezo replay makes the weights again

    --step N          the weights of that step (default: the best), as for smezo eval
Examples:
  smezo export RUN my-model
  smezo train model=own model.path=my-model
  smezo export RUN my.delta --delta
""",
    "replay": """\
smezo replay RUN [KEY=VALUE ...]    the trained weights again, from base model and trajectory alone
smezo replay FILE [KEY=VALUE ...]   the same from a delta (smezo export RUN FILE --delta)

    --step N          the weights after so many steps (default: the best; of a delta its last)
    --split SPLIT     what they are scored on: test (default), dev or none
    --out FOLDER      save the model there, as transformers loads it
Prints the SHA-256 of the weights and the figures, and whether they are those of the run; if not,
the exit code is 1. KEY=VALUE as for smezo eval; of a delta model.path and model.revision, too.
Examples:
  smezo replay runs/default/toy-tiny-llama-mezo-s0-0123abcd
  smezo replay my.delta --out my-model
""",
}


def main(verb: str, words: Sequence[str]) -> int:
    """Run `eval`, `predict`, `export` or `replay`; returns the exit code.

    Raises:
        UserError: a mistake on the line, or a run that cannot be used.
    """
    if "--help" in words or "-h" in words:
        print(USAGE[verb], end="")
        return 0
    verbs = {"eval": evaluate, "predict": predict, "export": export, "replay": replay}
    return verbs[verb](words)


# Settings that may differ from those of the training: of the task, what rows there are.
_MAY_CHANGE = ("task", "device", "dtype", "compute_dtype")
_WHERE = "model.device_map"  # may change, and come where there was none
_SAME_BITS = ("compile",)  # may change where steps are applied again: their bits do not
_OF_THE_TRAINING = (
    *("name", "kind", "source", "prompt", "prompts", "masked", "option_template"),
    *("sfc", "sfc_prompt"),
)


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
    from smezo_cli.store.folder import RunFolder

    path = Path(run)
    cfg, settings = _read_config(path, overrides)
    folder = RunFolder(path, to_read=True)
    try:
        state = folder.load_state()
        needed = {"prompts", "prompt", "rows"}
        if state is None or state.best_step is None or not needed <= state.notes.keys():
            damaged = "state.json" in folder.damaged()
            broken = " (its state.json is damaged)" if damaged else ""
            raise UserError(
                f"{path} has no trained weights yet{broken}: finish it with smezo train."
            )
        yield folder, state, settings, cfg
    finally:
        folder.close()


def _say_code(settings: Settings, say: Callable[[str], None]) -> None:
    """Tell before it happens that a model's own code runs; the run was allowed to, and says so."""
    if settings.model.get("trust_remote_code"):
        say(
            f"  remote code  Python files of {settings.model['path']} are executed, as the run was "
            "allowed to (model.trust_remote_code=true)"
        )


def _read_config(
    path: Path, overrides: Sequence[str], may_change: Sequence[str] = ()
) -> tuple[DictConfig, Settings]:
    """The settings that a run was trained with, some of them changed."""
    if not (path / "config.yaml").is_file():
        there = "has no config.yaml" if path.is_dir() else "is not there"
        raise UserError(f"{path} {there}: give the folder of a run (smezo runs lists them).")
    return _parsed(load_yaml(path / "config.yaml"), overrides, may_change)


def _parsed(
    cfg: DictConfig, overrides: Sequence[str], may_change: Sequence[str] = ()
) -> tuple[DictConfig, Settings]:
    with_later_keys(cfg)
    for word in overrides:
        _change(cfg, word, may_change)
    return cfg, check(cfg)


def _change(cfg: DictConfig, word: str, may_change: Sequence[str]) -> None:
    """Apply one KEY=VALUE to the settings of the run.

    Raises:
        UserError: not of that form, no such key, or one that must stay as it was trained.
    """
    key, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"{shlex.quote(word)} is not of the form KEY=VALUE, such as device=cpu.")
    top, *inside = key.split(".")
    allowed = top in _MAY_CHANGE or key in (*may_change, _WHERE)
    if not allowed or key == "task" or (inside and inside[0] in _OF_THE_TRAINING):
        raise UserError(
            f"{key}: a trained run keeps this setting; what may change is which rows it sees (such "
            "as task.num_test or task.data_dir), device, model.device_map, dtype and compute_dtype."
        )
    parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
    name = key.rpartition(".")[2]
    if not isinstance(parent, DictConfig) or (name not in parent and key != _WHERE):
        options = list(parent) if isinstance(parent, DictConfig) else []
        raise UserError(f"there is no setting {key}{near(name, map(str, options))}.")
    try:
        OmegaConf.update(cfg, key, OmegaConf.create(f"value: {value}").value)
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"cannot read {shlex.quote(word)}: {sentence(error)}.") from error


def _trained(
    folder: "RunFolder",
    state: "State",
    job: "Job",
    step: int | None,
    say: Callable[[str], None],
) -> int:
    """Put the trained weights into the model; the step that they are of."""
    from smezo_cli.replay import rebuild
    from smezo_cli.store.trajectory import read

    chosen = state.best_step if step is None else step
    assert chosen is not None  # _opened refuses a run without
    if is_frozen(job.settings.method):
        if chosen:
            raise UserError(f"--step {step}: {folder.path} took no steps; leave it out.")
        job.demonstrate(state.notes.get("demonstrations", {}).get("text", ""))
        if 0 in state.weights():
            job.set_probe(folder.load_weights(state, 0), folder.path)
        return 0
    path = folder.path / "trajectory.bin"
    if not path.exists():
        if chosen not in state.weights():
            steps = ", ".join(map(str, state.weights()))
            raise UserError(
                f"--step {step}: {folder.path} keeps the weights of step {steps}; "
                "a run with keep=all keeps those of every look at dev."
            )
        job.set_weights(folder.load_weights(state, chosen), folder.path)
        return chosen
    saved = folder.nearest(state, chosen, say)
    if saved is not None and saved[0] == chosen:
        job.set_weights(saved[1], folder.path)
        return chosen
    records = read(path)
    if not 0 <= chosen <= len(records):
        raise UserError(f"--step {step}: {folder.path} has made {len(records)} steps.")
    rebuild(job, _replayed(job, records, str(path)), folder, state, records, chosen, say)
    return chosen


def _replayed(job: "Job", records: "Trajectory", where: str) -> "ZeroOrder":
    """The method that made the records, at their start.

    Raises:
        UserError: the method or the model is another.
    """
    from smezo_cli.store.trajectory import differences
    from smezo_cli.zo.optimizer import ZeroOrder

    if records.header.get("model") != job.fingerprint():
        raise UserError(
            f"{where} was made from another model than {job.settings.model['name']} is here: "
            "put its weights back, or leave dtype out."
        )
    method = job.build_method()
    if not isinstance(method, ZeroOrder):
        raise UserError(f"{where}: method {job.settings.method['name']} has no trajectory.")
    mine = {"identity": method.identity()}
    if other := differences({"identity": records.header["identity"]}, mine):
        raise UserError(
            f"{where} was made with another {' and '.join(other)}: its steps cannot be applied "
            "by these settings and this version of smezo."
        )
    return method


def _prompt(state: "State") -> "Prompt":
    """The prompt that was trained with."""
    return _as_prompt(state.notes["prompts"][state.notes["prompt"]])


def _encoded(job: "Job", rows: Sequence["Row"], prompt: "Prompt", where: str) -> Any:
    """Rows under a prompt that was noted; UserError where it is none for such rows."""
    try:
        if len(prompt.labels) == len(job.prompts[0].labels):
            return job.encode(rows, prompt)
    except (LookupError, ValueError):
        pass
    raise UserError(
        f"{where}: its prompt {prompt.template[:60]!r} does not fit the rows of {job.task.name}; "
        "the file is damaged, or of another task."
    )


def _as_prompt(note: Mapping[str, Any]) -> "Prompt":
    from smezo_cli.tasks import Prompt

    option = note.get("option")
    labels = tuple(note["labels"])
    return Prompt(note["template"], labels, option or Prompt.option, sfc=note.get("sfc"))


def _batch(
    job: "Job",
    prompt: "Prompt",
    noted: Mapping[str, Any] | None,
    rows: Sequence["Row"] | None,
    say: Callable[[str], None],
) -> None:
    """Let rows share forwards as the run did; and as these rows may, which it did not see.

    Args:
        job: task and model, loaded.
        prompt: the run's.
        noted: what the run measured; None: nothing, as it is older, or of other rows.
        rows: that the run did not see; None: those that are scored are its own.
        say: receives a line where rows are kept apart.
    """
    from smezo_cli.scoring.batching import Found

    found = Found.of(dict(noted)) if noted is not None else Found()
    if noted is None or rows is not None:
        found = found.stricter(job.measure_batching([prompt], rows))
    found.to(job.scorer)
    if found.line:
        say(found.line)


def _kept_beside(path: Path, job: "Job") -> "PartialScores":
    """Where the scores are kept of a verb that is stopped: beside the file that it writes."""
    from smezo_cli.store.partial_scores import NAME, PartialScores

    return PartialScores(path.with_name(f".{path.name}.{NAME}"), job.model)


def _scored(
    job: "Job",
    rows: Any,
    split: str,
    console: "Console",
    kept: "PartialScores",
    step: int,
    where: str,
    as_it_came: bool = False,
) -> "Evaluation":
    """What the model makes of encoded rows, of which some may be scored from an earlier start.

    Raises:
        KeyboardInterrupt: a signal asked to stop, between two batches; the scores so far are kept.
        UserError: a score is not finite.
    """
    from smezo_cli.loop import evaluate
    from smezo_cli.machine.stop import Stopped, StopRequest
    from smezo_cli.scoring.batching import Found
    from smezo_cli.scoring.objectives import NonFiniteScore
    from smezo_cli.store.saved import tensors_digest

    probe, s, scorer = job.scorer.probe, job.settings, job.scorer
    about = {
        "step": step,
        "as_it_came": as_it_came,
        "probe": None if probe is None else tensors_digest(probe),
        "batching": Found(scorer.batching, scorer.batching_of_answers).plain(),
        "machine": [str(job.device), s.dtype, s.compute_dtype],
    }
    with StopRequest(console.say) as stop:
        part = kept.part(about, split, rows)
        done = len(part.answered if rows[0].kind == "generation" else part.scored)
        if done:
            console.say(f"  {done} of {len(rows)} rows were scored before the stop")
        bar = console.bar(split, len(rows), done)
        try:
            return evaluate(scorer, rows, bar, lambda: stop.asked, part=part)
        except NonFiniteScore as error:
            raise UserError(f"{where}: {error}; {job.why_not_finite()}.") from error
        except Stopped:
            try:
                count = f"{kept.keep()} of {len(rows)} rows"
                console.say(f"stopped; the scores of {count} are kept for the same command")
            except UserError as error:
                console.say(f"stopped; nothing is kept: {error}")
            raise KeyboardInterrupt from None


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
    streams.outlast()
    with _opened(given.run, given.overrides) as (folder, state, settings, _):
        from smezo_cli.job import Job
        from smezo_cli.log import Console
        from smezo_cli.machine.device import choose_device

        device = choose_device(settings.device, settings.model["device_map"])
        if given.overrides and given.out is None:
            raise UserError(
                f"{given.overrides[0]}: predictions under other settings need a file of their own: "
                "add --out FILE."
            )
        if given.out is None and not os.access(folder.path, os.W_OK):
            raise UserError(f"{folder.path} cannot be written to: add --out FILE.")
        console = Console()
        _say_code(settings, console.say)
        job = Job(settings, device, console.say)
        _check_model(state, job, given.overrides, given.run)
        step = 0 if given.base else _trained(folder, state, job, given.step, console.say)
        same_task = not any(word.startswith("task.") for word in given.overrides)
        known = {given.split: state.notes["rows"][given.split]}
        if same_task and job.differing_rows(known):
            raise UserError(
                f"the {given.split} rows are not those that {given.run} was trained with: the data "
                "has changed since; put it back, or say which to use (such as task.data=FILE)."
            )
        rows, prompt = getattr(job.task, given.split), _prompt(state)
        encoded = _encoded(job, rows, prompt, given.run)
        _batch(job, prompt, state.notes.get("batching"), None if same_task else rows, console.say)
        which = "-base" if given.base else "" if given.step is None else f"-step{step}"
        name = f"predictions-{given.split}{which}.jsonl"
        out = Path(given.out) if given.out else folder.path / name
        kept = _kept_beside(out, job)
        with job.as_it_came() if given.base else contextlib.nullcontext():
            found = _scored(job, encoded, given.split, console, kept, step, given.run, given.base)
        figures = found.figures()
        _write_lines(
            out,
            (
                {"id": row.id, "fields": dict(row.fields)} | prediction
                for row, prediction in zip(rows, found.predictions(), strict=True)
            ),
        )
        kept.remove()
        value = figures[found.metric]
        console.say(
            f"{given.split} {found.metric} {value:.4f} +- {figures['standard_error']:.4f} "
            f"(n={figures['n']}, {'untrained' if given.base else _at(settings, step)})"
        )
        for key in ("exact_match", "loss", "auc"):
            if figures.get(key) is not None:
                console.say(f"  {key}  {figures[key]:.4f}")
        console.say(f"  {out}")
    return 0


def _at(settings: Settings, step: int) -> str:
    return f"method {settings.method['name']}" if is_frozen(settings.method) else f"step {step}"


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
    from smezo_cli.files.atomic import write_text

    lines = [strict_json.dumps(record, ensure_ascii=False) + "\n" for record in records]
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
    parser.add_argument("--delta", action="store_true")
    given = parser.parse_args(list(words))
    target = Path(given.folder)
    if target.exists():
        raise UserError(
            f"{target} is there already: name a new {'file' if given.delta else 'folder'}."
        )
    _check_exported(given.run)
    streams.outlast()
    if given.delta:
        return _export_delta(given.run, target, given.step)
    with _opened(given.run) as (folder, state, settings, cfg):
        from smezo_cli.job import Job

        _say_code(settings, print)
        job = Job(*_copying(settings), lambda line: None, with_rows=False)
        _check_model(state, job, [], given.run)
        step = _trained(folder, state, job, given.step, print)
        size = _save_model(job, target, cfg)
        print(f"{target}: {settings.model['name']} after {step} steps, {_shown_bytes(size)}")
        print(f"  {job.loaded_by}")
    return 0


def _check_exported(run: str) -> None:
    """Refuse a run whose model is the one that it began with."""
    settings = _read_config(Path(run), ())[1]
    if is_frozen(settings.method):
        raise UserError(
            f"{run}: method {settings.method['name']} trains no weights of the model, so there is "
            f"nothing to export: it is model={settings.model['name']} as it came."
        )


def _save_model(job: "Job", target: Path, cfg: DictConfig) -> int:
    """Model, tokenizer and settings in a new folder, whole or not at all; its bytes."""
    from smezo_cli.files.atomic import check_space

    size = job.saved_bytes
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
    return size


def _copying(settings: Settings) -> tuple[Settings, str]:
    """For a job in which weights are copied: on the CPU, wherever the run was trained.

    Unless they are in 4 bits, which are made on the device that they are for.
    """
    from smezo_cli.machine.device import choose_device

    if settings.model["quantization"]:
        return settings, choose_device(settings.device)
    model = settings.model | {"device_map": None}
    return dataclasses.replace(settings, model=model), "cpu"


def _shown_bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size} bytes"


def _export_delta(run: str, target: Path, step: int | None) -> int:
    from smezo_cli.files.atomic import write_bytes
    from smezo_cli.store.delta import delta
    from smezo_cli.store.saved import tensors_digest
    from smezo_cli.store.trajectory import read

    with _opened(run) as (folder, state, settings, cfg):
        path = folder.path / "trajectory.bin"
        if not path.exists():
            raise UserError(
                f"--delta: {run} has no trajectory.bin, as only the runs of zeroth-order methods "
                "have; export it as a folder."
            )
        records = read(path)
        chosen = state.best_step if step is None else step
        assert chosen is not None  # _opened refuses a run without
        if not 0 <= chosen <= len(records):
            raise UserError(f"--step {step}: {run} has {len(records)} good steps in {path.name}.")
        noted = {note["step"]: note["sha256"] for note in state.notes.get("weights", {}).values()}
        if chosen not in noted:
            from smezo_cli.job import Job

            job = Job(*_copying(settings), lambda line: None, with_rows=False)
            _trained(folder, state, job, chosen, print)
            noted[chosen] = tensors_digest(job.build_method().trained)
        result = folder.result() or {}
        about = {
            "config": OmegaConf.to_yaml(cfg),
            "prompt": state.notes["prompts"][state.notes["prompt"]],
            "weights": {"step": chosen, "sha256": noted[chosen]},
            "test": result.get("test") if chosen == state.best_step else None,
            "dev": state.notes.get("best_look") if chosen == state.best_step else None,
            "versions": result.get("versions"),
            "batching": state.notes.get("batching"),
        }
        write_bytes(target, delta(records, chosen, about))
        size = target.stat().st_size
        print(
            f"{target}: {chosen} steps of {run}, {size} bytes ({size / max(chosen, 1):.1f} a step)"
        )
        print(f"  weights sha256 {noted[chosen]}")
        print(f"  made again by: smezo replay {shlex.quote(str(target))}")
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
    if given.out:
        streams.outlast()
    with _opened(given.run, overrides) as (folder, state, settings, _):
        from smezo_cli.job import Job
        from smezo_cli.log import Console
        from smezo_cli.machine.device import choose_device
        from smezo_cli.tasks.own import unlabelled

        # What is said goes beside the predictions, never among them; of the rows of the training
        # there is nothing to say.
        console = Console(sys.stdout if given.out else sys.stderr)
        prompt = _prompt(state)
        notes: list[str] = []
        rows = unlabelled(settings.task, prompt, files[0] if files else fields, notes)
        for note in notes:
            console.say(f"  note    {note}")
        _say_code(settings, console.say)
        device = choose_device(settings.device, settings.model["device_map"])
        job = Job(settings, device, lambda line: None, with_rows=False, warn=console.say)
        _check_model(state, job, overrides, given.run)
        step = _trained(folder, state, job, None, console.say)
        encoded = job.encode(rows, prompt)
        _batch(job, prompt, state.notes.get("batching"), rows, console.say)
        kept = _kept_beside(Path(given.out) if given.out else folder.path / "predictions", job)
        found = _scored(job, encoded, "predict", console, kept, step, given.run)
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
                print(strict_json.dumps(prediction, ensure_ascii=False))
        kept.remove()
    return 0


# --- replay ----------------------------------------------------------------------------------


def replay(words: Sequence[str]) -> int:
    """`smezo replay`: weights from base model and trajectory alone; 1 where they are others.

    Raises:
        UserError: a mistake on the line, a file that is damaged or of another model or method.
    """
    from smezo_cli.store.delta import is_delta

    parser = _Flags("replay")
    parser.add_argument("source")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--step", type=int)
    parser.add_argument("--split", choices=("test", "dev", "none"), default="test")
    parser.add_argument("--out")
    given = parser.parse_intermixed_args(list(words))
    if given.out is not None and Path(given.out).exists():
        raise UserError(f"--out {given.out} is there already: name a new folder.")
    streams.outlast()  # the exit code says it, too
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
    prompt: "Prompt",
    known: Mapping[str, Any],
    step: int,
) -> bool:
    """Do it and say it; is everything as the run recorded it?"""
    import time

    from smezo_cli.job import Job
    from smezo_cli.log import Console
    from smezo_cli.machine.device import choose_device
    from smezo_cli.store.saved import tensors_digest
    from smezo_cli.store.trajectory import replay as apply

    console = Console()
    device = choose_device(settings.device, settings.model["device_map"])
    _say_code(settings, console.say)
    job = Job(settings, device, console.say, with_rows=given.split != "none")
    same_task = not any(word.startswith("task.") for word in given.overrides)
    method = _replayed(job, records, given.source)
    if given.split != "none":  # before the steps, as in the run
        _encoded(job, getattr(job.task, given.split)[:1], prompt, given.source)
        _batch(job, prompt, known.get("batching") if same_task else None, None, console.say)
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
        size = _save_model(job, Path(given.out), cfg)
        console.say(f"  {given.out}: {_shown_bytes(size)}")
    if given.split == "none":
        return same
    of_run = {given.split: records.header.get("rows", {}).get(given.split, "")}
    if same_task and job.differing_rows(of_run):
        raise UserError(
            f"the {given.split} rows are not those of {given.source}: the data has changed since; "
            "put it back, say which to use (such as task.data=FILE), or add --split none."
        )
    rows = getattr(job.task, given.split)
    encoded = _encoded(job, rows, prompt, given.source)
    beside = Path(given.source) / "replay" if Path(given.source).is_dir() else Path(given.source)
    kept = _kept_beside(beside, job)
    scored = _scored(job, encoded, given.split, console, kept, step, given.source)
    figures = scored.figures()
    kept.remove()
    recorded = known[given.split] if step == known["step"] and same_task else None
    what = ""
    if recorded:
        other = [k for k, v in figures.items() if k in recorded and recorded[k] != v]
        same = same and not other
        what = ": " + (_said(True) if not other else f"{_said(False)} in {', '.join(other)}")
    console.say(
        f"  {given.split} {scored.metric} {figures[scored.metric]:.4f} +- "
        f"{figures['standard_error']:.4f} (n={figures['n']}){what}"
    )
    return same


def _said(same: bool) -> str:
    return "the same as the run's" if same else "NOT the same as the run's"


_Source = tuple[DictConfig, Settings, "Trajectory", "Prompt", dict[str, Any]]


def _of_delta(name: str, overrides: Sequence[str]) -> _Source:
    from smezo_cli.store.delta import read_delta
    from smezo_cli.store.trajectory import Damaged

    about, records = read_delta(Path(name))
    # The base may lie elsewhere here; and what somebody else trusted is not trusted for that.
    with_path = ("model.path", "model.revision", "model.trust_remote_code", *_SAME_BITS)
    cfg, settings = _parsed(parse_yaml(str(about.get("config")), Path(name)), overrides, with_path)
    trusted = "model.trust_remote_code=true"
    if settings.model.get("trust_remote_code") and trusted not in overrides:
        raise UserError(
            f"{name}: its model brings Python files, which would run with all your rights; if you "
            f"trust them, add {trusted}."
        )
    noted, figures = about.get("weights"), {key: about.get(key) for key in ("test", "dev")}
    if (
        not isinstance(noted, dict)
        or not is_known(noted.get("step"), noted.get("sha256"), list(figures.values()))
        or not is_prompt(about.get("prompt"))
        or not is_batching(about.get("batching"))
        or about["step"] > settings.steps
    ):
        raise Damaged(f"{name} is damaged: get it anew.")
    known = {"step": about["step"], "weights": {noted["step"]: noted["sha256"]}, **figures}
    known["batching"] = about.get("batching")
    return cfg, settings, records, _as_prompt(about["prompt"]), known


def _of_run(name: str, overrides: Sequence[str]) -> _Source:
    from smezo_cli.store.folder import RunFolder
    from smezo_cli.store.trajectory import read

    path = Path(name)
    cfg, settings = _read_config(path, overrides, _SAME_BITS)
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
    best = (result.get("dev") or {}).get("best") or {}
    noted = (result.get("weights") or {}).values()
    known = {
        "step": best.get("step") if best.get("step") is not None else len(records),
        "weights": {note["step"]: note["sha256"] for note in noted},
        **{"test": result.get("test"), "dev": best, "batching": result.get("batching")},
    }
    return cfg, settings, records, _as_prompt(result["prompt"]), known

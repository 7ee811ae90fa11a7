"""Open a run that has been trained: its settings, its model and its weights."""

import contextlib
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from smezo_cli.config.digest import with_later_keys
from smezo_cli.config.fixed import is_frozen, sentence
from smezo_cli.config.method_keys import trait
from smezo_cli.config.settings import Settings, check
from smezo_cli.errors import UserError, near, redacted
from smezo_cli.files.bounded import load_yaml
from smezo_cli.machine.waiting import waiting

if TYPE_CHECKING:
    from smezo_cli.run.console import Console
    from smezo_cli.run.loaded import Loaded
    from smezo_cli.scoring.evaluation import Evaluation
    from smezo_cli.store.folder import RunFolder, State
    from smezo_cli.store.partial_scores import PartialScores
    from smezo_cli.store.trajectory import Trajectory
    from smezo_cli.tasks import Prompt, Row
    from smezo_cli.tasks.mixture import Prompts
    from smezo_cli.zo.optimizer import ZeroOrder


# Settings that may differ from those of the training; of the task, only which rows there are.
_MAY_CHANGE = ("task", "device", "dtype", "compute_dtype")

_WHERE = "model.device_map"  # may change, or be new

SAME_BITS = ("compile",)  # may change where steps are replayed: the bits are the same

_OF_THE_TRAINING = (
    *("name", "kind", "source", "prompt", "prompts", "masked", "option_template"),
    *("sfc", "sfc_prompt", "parts", "weights", "nodes"),
)


@contextlib.contextmanager
def opened(
    run: str, overrides: Sequence[str] = ()
) -> Iterator[tuple["RunFolder", "State", Settings, DictConfig]]:
    """Give a trained run's folder (locked), state, and settings with the overrides."""
    path = Path(run)
    cfg, settings = read_config(path, overrides)  # before torch is loaded: it finds most mistakes
    with waiting("loading torch and transformers"):
        from smezo_cli.run.layers import resolved
        from smezo_cli.store.folder import RunFolder

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
        yield folder, state, resolved(settings, state.notes.get("dominant_layer")), cfg
    finally:
        folder.close()


def say_code(settings: Settings, say: Callable[[str], None]) -> None:
    """Announce that a model's own code will be executed, if the run allowed that."""
    if settings.model.get("trust_remote_code"):
        say(
            f"  remote code  Python files of {settings.model['path']} are executed, as the run was "
            "allowed to (model.trust_remote_code=true)"
        )


def read_config(
    path: Path, overrides: Sequence[str], may_change: Sequence[str] = ()
) -> tuple[DictConfig, Settings]:
    """Return the settings that a run was trained with, with the overrides."""
    if not (path / "config.yaml").is_file():
        there = "has no config.yaml" if path.is_dir() else "is not there"
        raise UserError(f"{path} {there}: give the folder of a run (smezo runs lists them).")
    return parsed(load_yaml(path / "config.yaml"), overrides, may_change)


def parsed(
    cfg: DictConfig, overrides: Sequence[str], may_change: Sequence[str] = ()
) -> tuple[DictConfig, Settings]:
    """Return a run's settings with the changes of a command line, checked."""
    with_later_keys(cfg)
    for word in overrides:
        _change(cfg, word, may_change)
    return cfg, check(cfg)


def _change(cfg: DictConfig, word: str, may_change: Sequence[str]) -> None:
    """Apply one KEY=VALUE to the settings of the run.

    Raises:
        UserError: the word is not of that form, or the key does not exist or must not change.
    """
    key, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"{shlex.quote(word)} is not of the form KEY=VALUE, such as device=cpu.")
    top, *inside = key.split(".")
    allowed = top in _MAY_CHANGE or key in (*may_change, _WHERE)
    if len(inside) > 2 and inside[0] == "nodes":  # a setting of one part of a mixture
        inside = inside[2:]
    if not allowed or key == "task" or (inside and inside[0] in _OF_THE_TRAINING):
        raise UserError(
            f"{key}: a trained run keeps this setting; what may change is which rows it sees (such "
            "as task.num_test or task.data_dir), device, model.device_map, dtype and compute_dtype."
        )
    if key == "dtype" and trait(cfg.method, "holds_codes", default=False):
        raise UserError(
            f"dtype: the codes of method={cfg.method.name} belong to scales that come from the "
            "weights in the dtype of the training: leave it out."
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


def trained(
    folder: "RunFolder",
    state: "State",
    loaded: "Loaded",
    step: int | None,
    say: Callable[[str], None],
) -> int:
    """Put the trained weights, of the best step or another, into the model; return their step."""
    from smezo_cli.run import mask
    from smezo_cli.run.replay import rebuild
    from smezo_cli.store.notes import noted_demonstrations
    from smezo_cli.store.trajectory import read

    chosen = state.best_step if step is None else step
    assert chosen is not None  # opened refuses a run without
    if is_frozen(loaded.settings.method):
        if chosen:
            raise UserError(f"--step {step}: {folder.path} took no steps; leave it out.")
        for part, note in noted_demonstrations(state.notes).items():
            loaded.demonstrate(note["text"], part)
        if 0 in state.weights():
            loaded.set_probe(folder.load_weights(state, 0), folder.path)
        return 0
    if mask.holds_codes(loaded):
        mask.use(loaded, folder.path)  # the saved weights are those of the model with codes
    path = folder.path / "trajectory.bin"
    if not path.exists():
        if chosen not in state.weights():
            if step is None:
                raise UserError(
                    f"{folder.path} does not keep the weights of its best step, {chosen}: start it "
                    "over with if_exists=fresh."
                )
            steps = ", ".join(map(str, state.weights()))
            raise UserError(
                f"--step {step}: {folder.path} keeps the weights of step {steps}; "
                "a run with keep=all keeps those of every evaluation of dev."
            )
        loaded.set_weights(folder.load_weights(state, chosen), folder.path)
        return chosen
    saved = folder.nearest(state, chosen, say)
    if saved is not None and saved[0] == chosen:
        loaded.set_weights(saved[1], folder.path)
        return chosen
    records = read(path)
    if not 0 <= chosen <= len(records):
        if step is None:
            raise UserError(
                f"{path} holds {len(records)} good steps, and the best is step {chosen}: give the "
                "command that trained the run again."
            )
        raise UserError(f"--step {step}: {folder.path} has made {len(records)} steps.")
    mask.use(loaded, folder.path)
    rebuild(loaded, replayed(loaded, records, str(path)), folder, state, records, chosen, say)
    return chosen


def replayed(loaded: "Loaded", records: "Trajectory", where: str) -> "ZeroOrder":
    """Return the method that made the records, ready for the first of them.

    Raises:
        UserError: the method or the model is another.
    """
    from smezo_cli.methods.base import replays
    from smezo_cli.run.method import build_method
    from smezo_cli.store.trajectory import differences

    if records.header.get("model") != loaded.fingerprint():
        raise UserError(
            f"{where} was made from another model than {loaded.settings.model['name']} is here: "
            "put its weights back, or leave dtype out."
        )
    method = build_method(loaded)
    if not replays(method):
        raise UserError(f"{where}: method {loaded.settings.method['name']} has no trajectory.")
    mine = {"identity": method.identity()}
    if other := differences({"identity": records.header["identity"]}, mine):
        raise UserError(
            f"{where} was made with another {' and '.join(other)}: its steps cannot be applied "
            "by these settings and this version of smezo."
        )
    return method


def prompt_of_run(state: "State") -> "Prompt | Prompts":
    """Return the prompt that the run was trained with; of a mixture that of each part."""
    from smezo_cli.store.notes import noted_prompt

    return as_prompt(noted_prompt(state.notes))


def encode_rows(
    loaded: "Loaded", rows: Sequence["Row"], prompt: "Prompt | Prompts", where: str
) -> Any:
    """Return rows under a noted prompt; raise UserError if it does not suit them."""
    words = {known.part: len(known.labels) for known in loaded.prompts}
    try:
        if all(len(one.labels) == words.get(one.part) for one in prompts_in(prompt)):
            return loaded.encode(rows, prompt)
    except (LookupError, ValueError):
        pass
    raise UserError(
        f"{where}: its prompt {prompts_in(prompt)[0].template[:60]!r} does not fit the rows of "
        f"{loaded.task.name}; the file is damaged, or of another task."
    )


def as_prompt(note: Any) -> "Prompt | Prompts":
    """Rebuild a prompt from what the run noted of it, or the prompts from a list of such notes."""
    from smezo_cli.tasks.mixture import Prompts

    if isinstance(note, list):
        return Prompts({of.get("part", ""): as_one_prompt(of) for of in note})
    return as_one_prompt(note)


def as_one_prompt(note: Mapping[str, Any]) -> "Prompt":
    """Rebuild a prompt from what the run noted of it."""
    from smezo_cli.tasks import Prompt

    option = note.get("option") or Prompt.option
    labels, part = tuple(note["labels"]), note.get("part", "")
    return Prompt(note["template"], labels, option, sfc=note.get("sfc"), part=part)


def prompts_in(prompt: "Prompt | Prompts") -> list["Prompt"]:
    """Return one prompt, or those of the parts of a mixture."""
    from smezo_cli.tasks.mixture import Prompts

    return list(prompt.parts.values()) if isinstance(prompt, Prompts) else [prompt]


def batch(
    loaded: "Loaded",
    prompt: "Prompt | Prompts",
    noted: Mapping[str, Any] | None,
    rows: Sequence["Row"] | None,
    say: Callable[[str], None],
) -> None:
    """Let rows share forwards as the run did, and no more than rows new to it allow.

    Args:
        loaded: task and model.
        prompt: the run's.
        noted: what the run measured; None: nothing, as the run is older, or has other rows.
        rows: that the run did not see; None: its own rows are scored.
        say: receives a line if rows are kept apart.
    """
    from smezo_cli.scoring.batching import Found

    found = Found.of(dict(noted)) if noted is not None else Found()
    if noted is None or rows is not None:
        found = found.stricter(loaded.measure_batching(prompts_in(prompt), rows))
    found.to(loaded.scorer)
    if found.line:
        say(found.line)


def kept_beside(path: Path, loaded: "Loaded") -> "PartialScores":
    """Return where a verb that is stopped keeps its scores: beside the file that it writes."""
    from smezo_cli.store.partial_scores import NAME, PartialScores

    return PartialScores(path.with_name(f".{path.name}.{NAME}"), loaded.model)


def score_rows(
    loaded: "Loaded",
    rows: Any,
    split: str,
    console: "Console",
    kept: "PartialScores",
    step: int,
    where: str,
    as_it_came: bool = False,
) -> "Evaluation":
    """Return what the model makes of encoded rows; on from an earlier start, if there was one.

    Raises:
        KeyboardInterrupt: a signal asked to stop, between two batches; the scores so far are kept.
        UserError: a score is not finite.
    """
    from smezo_cli.machine.stop import Stopped, StopRequest
    from smezo_cli.run.evaluate import evaluate, in_parts, lots, scores_follow_from
    from smezo_cli.run.not_finite import why_not_finite
    from smezo_cli.scoring.batching import Found
    from smezo_cli.scoring.evaluation import Evaluation
    from smezo_cli.scoring.objectives import NonFiniteScore
    from smezo_cli.tasks.mixture import weights_of

    s, scorer = loaded.settings, loaded.scorer
    batching = Found(scorer.batching, scorer.batching_of_answers).plain()
    about = scores_follow_from(loaded, batching, step, as_it_came)
    # Where no rows are loaded there are no prompts to choose from, and no dev.
    prompts = loaded.prompts if split == "dev" else ()
    with StopRequest(console.say) as stop:

        def of_lot(lot: Any, name: str) -> Evaluation:
            part = kept.part(about, split, lot)
            if done := part.num_done(lot[0].kind):
                console.say(f"  {done} of {len(lot)} rows were scored before the stop")
            bar = console.bar(f"{split} {name}".strip(), len(lot), part.num_done(lot[0].kind))
            return evaluate(scorer, lot, bar, lambda: stop.asked, part=part)

        def one(of_part: Any, name: str) -> Evaluation:
            cut = lots(s, prompts, split, of_part)
            return Evaluation.joined([of_lot(of_part[at], name) for at in cut])

        try:
            return in_parts(rows, weights_of(s.task), one)
        except NonFiniteScore as error:
            raise UserError(f"{where}: {error}; {why_not_finite(loaded)}.") from error
        except Stopped:
            try:
                count = f"{kept.keep()} of {len(rows)} rows"
                console.say(f"stopped; the scores of {count} are kept for the same command")
            except UserError as error:
                console.say(f"stopped; nothing is kept: {error}")
            raise KeyboardInterrupt from None


def check_model(state: "State", loaded: "Loaded", overrides: Sequence[str], run: str) -> None:
    """Raise UserError if the model is not the one that the run was trained on."""
    if any(word.startswith("dtype=") for word in overrides):
        return  # the same weights in another dtype have another fingerprint
    if state.notes.get("model") not in (None, loaded.fingerprint()):
        raise UserError(
            f"{run} was trained on another model than {loaded.settings.model['name']} is now: its "
            "weights on disk or on the hub have changed since."
        )


def save_model(
    loaded: "Loaded",
    target: Path,
    cfg: DictConfig,
    result: Mapping[str, Any],
    step: int,
    others: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Save model, tokenizer, settings and model card in a new folder, whole or not at all.

    Args:
        loaded: holds the model and its tokenizer.
        target: the new folder.
        cfg: settings of the run.
        result: its result.json; {} where there is none.
        step: whose weights are saved.
        others: texts of further files by their paths in the folder.

    Returns:
        Bytes of the weights.
    """
    from safetensors import SafetensorError

    from smezo_cli.files.space import check_space
    from smezo_cli.run.model_card import model_card

    size = loaded.saved_bytes
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target.parent, size, "the model", "choose a folder on another disk")
        loaded.save(partial)
        (partial / "smezo.yaml").write_text(redacted(OmegaConf.to_yaml(cfg)), encoding="utf-8")
        is_adapter = (partial / "adapter_config.json").is_file()
        card = model_card(
            *(loaded.settings, result, step), loaded_by=loaded.loaded_by, is_adapter=is_adapter
        )
        for name, text in {"README.md": card, **others}.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(text, encoding="utf-8")
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:  # the latter is what a full disk gives weights
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {target}: {reason}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return size

"""`smezo export`: write the trained weights as an ordinary model, an adapter or a delta."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from smezo_cli.cli.flags import Flags, shows_help
from smezo_cli.config.fixed import is_frozen
from smezo_cli.config.method_keys import trait
from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError
from smezo_cli.files.atomic import write_bytes
from smezo_cli.machine import streams
from smezo_cli.run.trained import (
    check_model,
    encode_rows,
    opened,
    prompt_of_run,
    prompts_in,
    read_config,
    save_model,
    say_code,
    trained,
)

if TYPE_CHECKING:
    from smezo_cli.run.loaded import Loaded
    from smezo_cli.store.folder import State

USAGE = """\
smezo export RUN FOLDER             the trained model and its tokenizer, as transformers loads them
                                    (an adapter merged into the weights; of a prefix peft's
                                    adapter, of tensor-train cores smezo's own)
                                    and a model card, README.md, as the hub reads it
smezo export RUN FOLDER --adapter   the adapter alone, as peft loads it beside the base model
                                    (not of tensor-train cores, which peft has not)
smezo export RUN FILE --delta       one small file, from which smezo replay makes the weights again

    --step N          the weights of that step (default: the best), as for smezo eval
    --lm-eval         and the test rows as a task of lm-evaluation-harness, in FOLDER/lm_eval: it
                      scores the same tokens (docs/guide/lm-eval.md)
Examples:
  smezo export RUN my-model
  smezo train model=own model.path=my-model
  smezo export RUN my.delta --delta
"""


def main(words: Sequence[str]) -> int:
    """Write a folder that `from_pretrained` loads, or a delta; return the exit code.

    Raises:
        UserError: a mistake on the line, a folder that is there already, no space.
    """
    if shows_help(words, USAGE):
        return 0
    parser = Flags("export")
    parser.add_argument("run")
    parser.add_argument("folder")
    parser.add_argument("--step", type=int)
    parser.add_argument("--delta", action="store_true")
    parser.add_argument("--lm-eval", action="store_true")
    parser.add_argument("--adapter", action="store_true")
    given = parser.parse_args(list(words))
    target = Path(given.folder)
    if target.exists():
        raise UserError(
            f"{target} is there already: name a new {'file' if given.delta else 'folder'}."
        )
    _check_exported(given.run, given.adapter)
    if given.adapter and given.delta:
        raise UserError("--adapter beside --delta: a delta makes the adapter again; leave one out.")
    if given.lm_eval:
        _check_lm_eval(given.run, is_delta=given.delta)
    streams.outlast()
    if given.delta:
        return _export_delta(given.run, target, given.step)
    with opened(given.run) as (folder, state, settings, cfg):
        from smezo_cli.run.loaded import Loaded

        say_code(settings, print)
        job = Loaded(*_copying(settings), lambda line: None, with_rows=given.lm_eval)
        check_model(state, job, [], given.run)
        step = trained(folder, state, job, given.step, print)
        if job.adapter is not None and given.adapter:
            job.adapter.merges = False
        tasks, lines = _lm_eval(job, state, target, given.run) if given.lm_eval else ({}, [])
        size = save_model(job, target, cfg, folder.result() or {}, step, tasks)
        print(f"{target}: {settings.model['name']} after {step} steps, {shown_bytes(size)}")
        if "BASE" in job.loaded_by and (base := job.model.config.name_or_path):
            lines = [f"  BASE is {base}", *lines]
        print("\n".join([f"  {job.loaded_by}", *lines]))
    return 0


def _check_exported(run: str, needs_adapter: bool) -> None:
    """Raise UserError if the run leaves the model as it came, or has no adapter to export."""
    settings = read_config(Path(run), ())[1]
    if needs_adapter and settings.method.get("adapter") is None:
        raise UserError(
            f"--adapter: method {settings.method['name']} of {run} trains the model itself, and "
            "has no adapter: leave --adapter out."
        )
    if needs_adapter and settings.method["adapter"]["kind"] == "tensor_train":
        raise UserError(
            "--adapter: peft has no adapters of tensor-train cores, as method "
            f"{settings.method['name']} of {run} trains: leave --adapter out, which writes them in "
            "smezo's own form."
        )
    if is_frozen(settings.method):
        raise UserError(
            f"{run}: method {settings.method['name']} trains no weights of the model, so there is "
            f"nothing to export: it is model={settings.model['name']} as it came."
        )


def _check_lm_eval(run: str, *, is_delta: bool) -> None:
    """Raise UserError where lm-eval could not score the model of the run, before it is loaded."""
    if is_delta:
        raise UserError("--delta and --lm-eval exclude each other: lm-eval reads a folder.")
    settings = read_config(Path(run), ())[1]
    name = settings.model["name"]
    if settings.model["family"] == "masked":
        raise UserError(
            f"--lm-eval: model={name} fills masks, and lm-evaluation-harness scores causal models "
            "alone: leave --lm-eval out, smezo eval scores the run."
        )
    if (settings.method.get("adapter") or {}).get("kind") == "tensor_train":
        raise UserError(
            f"--lm-eval: the adapter of method={settings.method['name']} is smezo's own, which "
            "lm-evaluation-harness does not load: leave --lm-eval out, smezo eval scores the run."
        )


def _lm_eval(
    job: "Loaded", state: "State", target: Path, run: str
) -> tuple[dict[str, str], list[str]]:
    """Return the files of the test rows as tasks of lm-eval, and lines on how it scores them."""
    from smezo_cli.integrations.lm_eval import FOLDER, check_prompts, task_files, task_name
    from smezo_cli.scoring.parts import by_part

    prompt = prompt_of_run(state)
    check_prompts(prompts_in(prompt))
    if job.differing_rows({"test": state.notes["rows"]["test"]}):
        raise UserError(
            f"--lm-eval: the test rows are not those that {run} was trained with: the data has "
            "changed since; put it back."
        )
    files, names, cut = dict[str, str](), list[str](), 0
    rows = by_part(job.task.test)
    for one in prompts_in(prompt):
        encoded = encode_rows(job, rows[one.part], one, run)
        node = job.node_of(one.part)
        for name, text in task_files(node, rows[one.part], encoded, one, job.tokenizer).items():
            files[f"{FOLDER}/{name}"] = text
        names.append(task_name(node["name"]))
        cut += sum(c.truncated for c in encoded)
    settings, folder = job.settings, shlex.quote(str(target))
    model = f"pretrained={folder}"
    if job.adapter is not None and "peft loads" in job.loaded_by:
        base = shlex.quote(str(job.model.config.name_or_path or "BASE"))
        model = f"pretrained={base},peft={folder},tokenizer={folder}"
    # By itself lm-eval cuts at what the model can read.
    model += f",max_length={job.max_length}"
    if (computed := settings.compute_dtype or settings.dtype) != settings.dtype:
        model += f",mixed_precision_dtype={computed}"
    if computed != "float32":  # as smezo adds up log-probabilities
        model += ",softmax_dtype=float32"
    lines = [
        f"  lm-eval scores {len(job.task.test)} test rows: lm_eval --model hf --model_args {model} "
        f"--include_path {folder}/{FOLDER} --tasks {','.join(names)}"
    ]
    if cut:
        lines.append(
            f"  {cut} of these rows are longer than model.max_length={job.max_length}: lm-eval "
            "cuts them elsewhere, so that their scores differ"
        )
    return files, lines


def _copying(settings: Settings) -> tuple[Settings, str]:
    """Return settings and device for copying weights: the CPU, wherever the run was trained.

    Weights in 4 bits are copied on the device that they were made for.
    """
    from smezo_cli.machine.device import choose_device

    if settings.model["quantization"]:
        return settings, choose_device(settings.device)
    model = settings.model | {"device_map": None}
    return dataclasses.replace(settings, model=model), "cpu"


def shown_bytes(size: int) -> str:
    """Return a size in words: GB, or bytes where it is small."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size} bytes"


def _export_delta(run: str, target: Path, step: int | None) -> int:
    from smezo_cli.run.layers import with_numbers
    from smezo_cli.store.delta import delta
    from smezo_cli.store.notes import noted_prompt
    from smezo_cli.store.saved import tensors_digest
    from smezo_cli.store.trajectory import read

    with opened(run) as (folder, state, settings, cfg):
        if trait(settings.method, "needs_mask", default=False):
            raise UserError(
                f"--delta: the steps of method {settings.method['name']} need the mask of {run}, "
                "which a delta does not hold; export it as a folder."
            )
        path = folder.path / "trajectory.bin"
        if not path.exists():
            raise UserError(
                f"--delta: {run} has no trajectory.bin, as only the runs of zeroth-order methods "
                "have; export it as a folder."
            )
        records = read(path)
        chosen = state.best_step if step is None else step
        assert chosen is not None  # opened refuses a run without
        if not 0 <= chosen <= len(records):
            raise UserError(f"--step {step}: {run} has {len(records)} good steps in {path.name}.")
        noted = {note["step"]: note["sha256"] for note in state.notes.get("weights", {}).values()}
        if chosen not in noted:
            from smezo_cli.run.loaded import Loaded
            from smezo_cli.run.method import build_method

            job = Loaded(*_copying(settings), lambda line: None, with_rows=False)
            trained(folder, state, job, chosen, print)
            noted[chosen] = tensors_digest(build_method(job).trained)
        result = folder.result() or {}
        about = {
            "config": OmegaConf.to_yaml(with_numbers(cfg, settings)),
            "prompt": noted_prompt(state.notes),
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

"""Kind `run_folders`: run folders from elsewhere."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz import product
from fuzz.cases import Case, kind
from fuzz.fixtures import train
from fuzz.hostile import (
    as_json,
    as_yaml,
    bomb,
    reseal,
    spoil_bytes,
    spoil_notes,
    spoil_safetensors,
    spoil_tree,
)

_WRITTEN = (  # through a link of that name a verb might write somewhere else
    *(".result.json.partial", ".config.yaml.partial", "console.log", "metrics.jsonl", ".lock"),
    *(".predictions-test.jsonl.partial", "predictions-test.jsonl"),
)


def spoil_tensors(case: Case, file: Path) -> None:
    """Other tensors, and other words beside them, under digests that are right."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, framework="pt") as saved:
        about = json.loads((saved.metadata() or {}).get("smezo", "{}"))
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
    for _ in range(case.pick((0, 1, 1, 2))):
        name = case.pick(list(tensors))
        was = tensors[name]
        some: list[Callable[[], Any]] = [
            lambda was=was: torch.full_like(was, math.nan) if was.is_floating_point() else -was,
            lambda was=was: was * 1e38 if was.is_floating_point() else was + 2**40,
            lambda was=was: was.double(),
            lambda was=was: was.to(case.pick((torch.int8, torch.bool, torch.bfloat16))),
            lambda was=was: was.reshape(-1)[: case.below(3)].clone(),
            lambda was=was: was[None].clone(),
            lambda: torch.zeros(()),
            lambda: torch.zeros(0, 7),
        ]
        tensors[name] = case.pick(some)()
        if case.chance(0.3):
            tensors[case.pick(("x", "../x", "dev", "test", "labels"))] = tensors.pop(name)
    if case.chance(0.5):
        about = spoil_tree(case, about)
    if isinstance(about, dict):
        about["sha256"] = product.tensors_digest(tensors)
    words = as_json(about).decode("utf-8", "replace")
    save_file({k: t.contiguous() for k, t in tensors.items()}, file, {"smezo": words})
    state = file.parent / "state.json"
    if not state.is_file():  # a pipe would wait for ever
        return
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        tree = json.loads(state.read_text())
        tree["files"][file.name] = about["sha256"]
        state.write_bytes(as_json(reseal(case, tree)))


def spoil_file(case: Case, run: Path, file: Path) -> None:
    """Spoil a file of a run folder, or put something else in its place."""
    match case.below(12):
        case 0:
            file.unlink()
            file.symlink_to(
                case.pick(("/dev/zero", "../../../../outside/keep.txt", "/", "/proc/self/mem"))
            )
        case 1:
            name = case.pick(_WRITTEN)
            with contextlib.suppress(IsADirectoryError, FileExistsError):
                (run / name).unlink(missing_ok=True)
                (run / name).symlink_to("../../../../outside/keep.txt")
        case 2:
            file.unlink()
            file.mkdir()
        case 3:
            if case.chance(0.5):
                file.unlink()
                os.mkfifo(file)
            elif (run / "checkpoint").is_dir() and not (run / "checkpoint").is_symlink():
                shutil.rmtree(run / "checkpoint")
                (run / "checkpoint").symlink_to("../../../../outside")
        case 4 | 5 | 6 | 7 if file.suffix == ".safetensors":
            with contextlib.suppress(Exception):  # where it is spoiled already
                spoil_tensors(case, file)
        case _ if file.suffix == ".safetensors":
            file.write_bytes(spoil_safetensors(case, file.read_bytes()))
        case 4 if file.suffix in (".json", ".yaml", ".jsonl", ".log"):
            file.write_bytes(spoil_bytes(case, file.read_bytes()))
        case 6 if file.name == "config.yaml":
            file.write_bytes(file.read_bytes() + bomb(case))
        case _ if file.suffix == ".json":
            with contextlib.suppress(ValueError, OSError):
                tree = spoil_notes(case, json.loads(file.read_text()))
                file.write_bytes(as_json(reseal(case, tree)))
        case _ if file.name == "config.yaml":
            import yaml

            with contextlib.suppress(yaml.YAMLError, ValueError, UnicodeError):
                file.write_bytes(as_yaml(spoil_tree(case, yaml.safe_load(file.read_text()))))
        case _:
            file.write_bytes(spoil_bytes(case, file.read_bytes()))


def read_run(case: Case, run: Path, which: str) -> None:
    """Give the run folder to one of the verbs that read it."""
    match case.below(13):
        case 0 | 1:
            case.smezo("runs")
            case.smezo("runs", "--mean")
        case 12:
            sort = case.pick(("curve", "sparsity", "lr", "memory", "active"))
            case.smezo("plot", sort, "--out", "out.svg")
            case.smezo("report", "--out", "out.html")
        case 2:
            shutil.copytree(case.fixtures / "run", case.folder / "runs" / "g" / "s")
            case.smezo("runs", "--compare", "runs/g/r", "runs/g/s", "--json")
        case 3:
            case.smezo("runs", "--sort", case.pick(("score", "lr", "test.auc", "versions.torch")))
        case 4:
            case.smezo("export", "runs/g/r", "out/model")
        case 5:
            (case.folder / "rows.jsonl").write_text('{"text": "a fine film"}\n')
            case.smezo("predict", "runs/g/r", "rows.jsonl", "--out", "out.jsonl")
        case 6 | 7 | 8:
            train(case, run, which)
        case 9:
            if case.chance(0.5):
                case.smezo("export", "runs/g/r", "out.delta", "--delta")
            else:
                case.smezo("replay", "runs/g/r", codes=(0, 1))
        case 10:
            base = case.chance(0.3)
            case.smezo("eval", "runs/g/r", *(["--base"] if base else ["--step", "2"]))
        case _:
            other = ["task.num_test=2", "--out", "out.jsonl"] if case.chance(0.3) else []
            case.smezo("eval", "runs/g/r", *other)


@kind(5)
def run_folders(case: Case) -> None:
    """Run folders from elsewhere: state, result, settings, metrics, tensors, links."""
    run = case.folder / "runs" / "g" / "r"
    which = case.pick(("run", "run", "adamw"))
    shutil.copytree(case.fixtures / which, run)
    for _ in range(case.pick((1, 1, 2))):
        files = [f for f in sorted(run.rglob("*")) if f.is_file() and not f.is_symlink()]
        if not files:
            break
        heavier = [f for f in files if f.suffix == ".json" or f.name == "config.yaml"]
        file = case.pick((*files, *heavier))
        spoil_file(case, run, file)
    if case.chance(0.2):
        with contextlib.suppress(OSError):  # where it is a folder now
            (run / "result.json").unlink()
    read_run(case, run, which)

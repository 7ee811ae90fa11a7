"""Find the blocks of a model, and which of them come before anything that is trained."""

import json
import operator
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from smezo_cli.errors import UserError

# Where the models of a family have their blocks, and what stands behind the last one. All else
# stands before the first one.
_FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
        ("layers", ("norm",)),
    ),
    "opt": ("decoder.layers", ("decoder.final_layer_norm", "decoder.project_out")),
    "roberta": ("encoder.layer", ("pooler",)),
}

NAMES = "Llama, Mistral, Qwen2, Qwen3, Gemma, OPT and RoBERTa"


@dataclass(frozen=True)
class Blocks:
    """Name the blocks of a model, each of which takes hidden states and returns them.

    Attributes:
        path: in the model, of the list that they are in.
        body: the module that has them, and the embedding, but not the output layer.
        modules: the blocks in order.
        behind: ``id`` of the parameters that are read behind the last block alone.
    """

    path: str
    body: nn.Module
    modules: tuple[nn.Module, ...]
    behind: frozenset[int]

    def first_trained(self, trained: Iterable[nn.Parameter]) -> int:
        """Return the number of the first block that has one of some parameters.

        0 if something is trained that is read before the blocks, or nobody knows where; as many as
        there are if all that is trained lies behind them.
        """
        owners: dict[int, int] = {}
        for number, block in enumerate(self.modules):
            for parameter in block.parameters():
                owners.setdefault(id(parameter), number)
        last = len(self.modules)
        return min(
            (last if id(p) in self.behind else owners.get(id(p), 0) for p in trained), default=last
        )

    def globs(self, count: int) -> list[str]:
        """Return globs of the names of what the first blocks have, up to 100 of them."""
        tens, ones = divmod(count, 10)
        numbers = ["[0-9]"] if tens else []
        if tens > 1:
            numbers.append("1[0-9]" if tens == 2 else f"[1-{tens - 1}][0-9]")
        if ones:
            numbers.append(f"{tens or ''}" + ("0" if ones == 1 else f"[0-{ones - 1}]"))
        return [f"{self.path}.{number}.*" for number in numbers]


def blocks_of(model: nn.Module) -> Blocks | None:
    """Return the blocks of a language model of transformers; None of a make not known here."""
    loose: Any = model  # without types
    family = _FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    body = getattr(loose, "base_model", None)
    if family is None or not isinstance(body, nn.Module) or body is model:
        return None
    path, names = family
    found = _module(body, path)
    is_known = type(model).__module__.startswith("transformers.models.")
    if not is_known or not isinstance(found, nn.ModuleList) or not len(found):
        return None
    behind = [_module(body, name) for name in names] + [_module(model, "lm_head")]
    apart = {id(p) for part in behind if part is not None for p in part.parameters()}
    # A weight that is shared counts where it is read first: a tied output layer is an embedding.
    inside = {id(p) for part in behind[:-1] if part is not None for p in part.parameters()}
    tied = {id(p) for p in body.parameters()} - inside
    where = f"{loose.base_model_prefix}.{path}"
    return Blocks(where, body, tuple(found), frozenset(apart - tied))


def _module(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path, if there is one."""
    try:
        found = operator.attrgetter(path)(model)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Module) else None


def begin_at(
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    method: Mapping[str, Any],
    *,
    asked: object,
    mode: str,
) -> tuple[Blocks, int]:
    """Return the blocks of a model and the number of the first one that must be computed anew.

    Args:
        model: a language model of transformers.
        trained: what is trained of it, by name.
        method: the node of the method that trains it.
        asked: the value of ``keep_inputs``, for the message.
        mode: "train" if the model is in that mode while it is trained.

    Raises:
        UserError: all blocks must be.
    """

    def refused(why: str, way_out: str = "") -> UserError:
        given = str(asked).lower()
        return UserError(f"keep_inputs={given}: {why}: {way_out}leave keep_inputs out.")

    if method.get("objective") == "f1":
        raise refused("method.objective=f1 generates answers by the whole model")
    if (method.get("adapter") or {}).get("kind") == "prefix":
        raise refused("a prefix has keys and values in every block")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise refused("model.device_map has blocks on several devices")
    loose: Any = model  # without types
    if mode == "train" and _drops(loose.config.to_dict()):
        raise refused("in training the model drops activations at random, anew in each step")
    if (blocks := blocks_of(model)) is None:
        raise refused(f"{type(model).__name__} is not one of {NAMES}")
    if first := blocks.first_trained(trained.values()):
        return blocks, first
    before = [name for name, p in trained.items() if not blocks.first_trained([p])]
    outside = [name for name in before if not name.startswith(f"{blocks.path}.")]
    others = [name for name in trained if name not in outside]
    globs = (
        *method.get("freeze", ()),
        *(_around(name, others) for name in outside),
        *blocks.globs(max(1, len(blocks.modules) * 3 // 4)),
    )
    word = f"method.freeze=[{','.join(json.dumps(glob) for glob in dict.fromkeys(globs))}]"
    raise refused(
        f"{before[0]} is trained, and all blocks lie behind it",
        f"freeze what comes before the last blocks, such as by {shlex.quote(word)}, or ",
    )


def _drops(config: Mapping[str, Any]) -> bool:
    """Say whether a model has a dropout that is switched on in training."""
    return any("drop" in key and bool(value) for key, value in config.items())


def _around(name: str, others: Sequence[str]) -> str:
    """Return a short glob that matches a name of a parameter, and none of the others."""
    parts = name.split(".")
    for depth in range(2, len(parts)):
        above = ".".join(parts[:depth])
        if not any(other.startswith(f"{above}.") for other in others):
            return f"{above}.*"
    return name

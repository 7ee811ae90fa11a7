"""Freeze parts of a model for images or sound, which no text reaches.

A step would perturb them without effect, move them along its noise, and save them.
"""

from collections.abc import Mapping, Sequence
from fnmatch import filter as matching
from typing import Any

import torch
from torch import nn

from smezo_cli.zo.probe import FunctionalProbe
from smezo_cli.zo.reached import Reads


def freeze_unread(model: nn.Module) -> list[str]:
    """Freeze what a text does not read in a model that also takes images or sound.

    Only where the config has one of its own for text, and only parameters outside of the decoder
    and of both embeddings, of which a forward over a text reads none. An expert that the text was
    not sent to lies in the decoder, and stays as it is.

    Args:
        model: of transformers; ``requires_grad`` of parameters is switched off.

    Returns:
        Names of the modules (or parameters) that were frozen, the outermost.
    """
    loose: Any = model  # without types
    config = loose.config
    if config.get_text_config() is config:
        return []
    parts = loose.get_decoder(), loose.get_input_embeddings(), loose.get_output_embeddings()
    of_text = {id(p) for part in parts if part is not None for p in part.parameters()}
    outside = [p for p in model.parameters() if id(p) not in of_text and p.requires_grad]
    if not outside:
        return []
    was_training = model.training
    ids = torch.ones((1, 4), dtype=torch.int64, device=next(model.parameters()).device)
    reads = Reads(outside)
    try:
        model.eval()
        with torch.no_grad(), FunctionalProbe(model, outside).at(reads), reads:
            loose(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception:  # it takes no text alone, which its scores will say
        return []
    finally:
        model.train(was_training)
    unread = {id(p) for p in outside} - reads.moved - reads.read
    for p in outside:
        p.requires_grad_(id(p) not in unread)
    return _outermost(model, unread)


def without_unread(
    node: Mapping[str, Any], model: nn.Module, unread: Sequence[str]
) -> Mapping[str, Any]:
    """Return a method's node without globs for what is frozen because text never reads it.

    Globs that match nothing stay, to be refused.

    Args:
        node: of the method.
        model: after :func:`freeze_unread`.
        unread: what that has frozen.
    """
    if not unread or "freeze" not in node:
        return node
    named = [(name, p.requires_grad) for name, p in model.named_parameters()]
    trained = [name for name, is_trained in named if is_trained]
    frozen = [
        name
        for name, _ in named
        if any(name == part or name.startswith(f"{part}.") for part in unread)
    ]
    kept = [g for g in node["freeze"] if matching(trained, g) or not matching(frozen, g)]
    return {**node, "freeze": kept}


def _outermost(model: nn.Module, unread: set[int]) -> list[str]:
    """Name the modules that hold only these parameters, and the parameters outside of them."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        own = [id(p) for p in module.parameters()]
        if name and own and not inside and unread.issuperset(own):
            found.append(name)
    for name, p in model.named_parameters():
        if id(p) in unread and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found

"""Spread a model's layers over several GPUs of one machine, by accelerate's device maps.

Accelerate wraps the forwards of modules in hooks that bring activations to the weights. Weights
never move, so that probes, masks and updates are those of a model on one device.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smezo_cli.errors import UserError

# Of what is free on a GPU, for weights; the rest is for activations and the scratch of probes.
_FOR_WEIGHTS = 0.9


def devices_of_modules(
    model: PreTrainedModel,
    device_map: str | Mapping[str, str],
    free: Mapping[int, int] | None = None,
) -> dict[str, torch.device]:
    """Return the device of each module; the modules cover all tensors, and none holds another.

    Args:
        model: its tensors may be on the meta device; tied ones must be tied.
        device_map: a checked ``model.device_map``.
        free: bytes that may be taken of each GPU, by its number; None asks accelerate. Read of
            "auto" and the like alone.

    Raises:
        UserError: the GPUs do not hold the model, or the map does not fit it.
    """
    if isinstance(device_map, str):
        found = _inferred(model, device_map, _free() if free is None else free)
    else:
        found = {name: torch.device(place) for name, place in device_map.items()}
    by_tensor = _by_tensor(model, found, is_given=not isinstance(device_map, str))
    if len(set(by_tensor.values())) == 1:
        return {"": next(iter(by_tensor.values()))}
    _check_together(model, by_tensor)
    return dict(_grouped(model, by_tensor))


def spread(model: PreTrainedModel, places: Mapping[str, torch.device]) -> None:
    """Put a model's modules where they belong, and let activations follow.

    Args:
        model: changed in place; one that transformers has spread by these places already is taken.
        places: of :func:`devices_of_modules`, several devices.
    """
    from accelerate import dispatch_model

    loose: Any = model  # has no types for what follows
    kept = getattr(model, "_skip_keys_device_placement", None) or []
    first = loose.get_input_embeddings().weight
    if getattr(model, "hf_device_map", None) is None:
        dispatch_model(model, dict(places), skip_keys=kept)
        first = loose.get_input_embeddings().weight
    # Accelerate takes any device of the map for the inputs. On that of the embedding the masks and
    # positions which are made of them meet it.
    loose._hf_hook.execution_device = first.device
    # It is a place among the states behind the last layer, on whatever device they are.
    kept = [kept] if isinstance(kept, str) else list(kept)
    loose._hf_hook.skip_keys = [*kept, "logits_to_keep"]


def _free() -> dict[int, int]:
    from accelerate.utils import get_max_memory

    memory = get_max_memory()
    return {k: int(_FOR_WEIGHTS * v) for k, v in memory.items() if isinstance(k, int)}


def _inferred(model: PreTrainedModel, way: str, free: Mapping[int, int]) -> dict[str, torch.device]:
    """Return accelerate's choice of devices; UserError if the GPUs do not hold the model."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    together = sorted({type(module).__name__ for _, module in _whole(model)})
    memory = dict(free)
    if way != "sequential":
        memory = get_balanced_memory(
            model,
            max_memory=memory,
            no_split_module_classes=together,
            low_zero=way == "balanced_low_0",
        )
    found = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=together)
    outside = [name for name, place in found.items() if place == "disk"]
    if outside:
        size = sum(t.numel() * t.element_size() for _, t in _tensors(model))
        number, total = len(free), sum(free.values())
        last = f" to {outside[-1]}" if len(outside) > 1 else ""
        raise UserError(
            f"model.device_map={way}: of {size / 1e9:.3g} GB of weights {len(outside)} modules "
            f"({outside[0]}{last}) find no place on {number} GPU{'s' * (number != 1)}, where "
            f"{total / 1e9:.3g} GB may be taken, and weights outside GPUs (offload) cannot be "
            "trained so far: use more GPUs or larger ones, dtype=bfloat16, or a smaller model."
        )
    return {name: torch.device("cuda", int(place)) for name, place in found.items()}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name; a tied one once for each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _by_tensor(
    model: nn.Module, found: Mapping[str, torch.device], is_given: bool
) -> dict[str, torch.device]:
    """Return the device of each tensor by its name: that of the nearest module around it."""
    modules = dict(model.named_modules())
    for name in found if is_given else ():
        if name not in modules:
            close = difflib.get_close_matches(name, modules, n=2, cutoff=0.65)
            hint = " or ".join(close or list(modules)[1:4])
            raise UserError(
                f"model.device_map names {name}, and {type(model).__name__} has no such module; "
                f"did you mean {hint}?"
            )
    places: dict[str, torch.device] = {}
    for name, _ in _tensors(model):
        around = name
        while around not in found and around:
            around = around.rpartition(".")[0]
        if around not in found:
            raise UserError(
                f"model.device_map says of {name} nothing: name its module, or '' for all that "
                "is not named."
            )
        places[name] = found[around]
    return places


def _whole(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules that stay on one device: transformers' blocks, and owners with children.

    The tensors that a module itself owns are moved with the whole of it alone.
    """
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if type(module).__name__ in blocks or (own and list(module.children())):
            yield name, module


def _check_together(model: PreTrainedModel, by_tensor: Mapping[str, torch.device]) -> None:
    """Raise UserError for two devices within a block, or for one tied weight."""
    kind = type(model).__name__
    if not getattr(model, "_no_split_modules", None):
        raise UserError(
            f"model.device_map: transformers does not say which blocks of {kind} belong together, "
            "so it cannot be spread; leave model.device_map out."
        )
    for name, module in _whole(model):
        dot = f"{name}." if name else ""
        places = {by_tensor[dot + own] for own, _ in _tensors(module)}
        if len(places) > 1:
            raise UserError(
                f"model.device_map splits {name or 'the whole'}, a {type(module).__name__}, over "
                f"{' and '.join(sorted(map(str, places)))}: it must lie on one device, so name "
                f"{name!r} itself."
            )
    of_same: dict[int, str] = {}
    for name, tensor in _tensors(model):
        other = of_same.setdefault(id(tensor), name)
        if by_tensor[name] != by_tensor[other]:
            raise UserError(
                f"model.device_map has {other} on {by_tensor[other]} and {name} on "
                f"{by_tensor[name]}, and they are one tied weight: give both modules one device."
            )


def _grouped(
    model: nn.Module, by_tensor: Mapping[str, torch.device], name: str = ""
) -> Iterator[tuple[str, torch.device]]:
    """Yield the largest modules that lie on one device; accelerate wants none inside another."""
    dot = f"{name}." if name else ""
    places = {by_tensor[dot + own] for own, _ in _tensors(model)}
    if len(places) == 1:
        yield name, places.pop()
    elif places:
        for child, module in model.named_children():
            yield from _grouped(module, by_tensor, dot + child)

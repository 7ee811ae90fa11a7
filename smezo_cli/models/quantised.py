"""Freeze a model as codes of 8 or 4 bits around a few weights that are trained; save it as numbers.

Codes are those of :mod:`smezo_cli.zo.quantised`, which need no library beside torch and compute on
any device. bitsandbytes (``model.quantization=4bit``) has kernels of its own for CUDA alone, and
torchao 0.18 gives each weight of 4 bits a byte on a CPU.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smezo_cli.zo.quantised import QuantisedLinear, linear_layers, quantised_layers, replace


def freeze_as_codes(
    model: nn.Module, kept_at: Mapping[str, Tensor], *, bits: int = 4, group_size: int = 64
) -> dict[str, nn.Parameter]:
    """Hold linear layers as codes that stay as they are, but for some weights of each.

    Afterwards ``NAME.kept`` is a parameter of a layer called NAME: the chosen weights (n,) in their
    own dtype, which stand in for those of the codes. It requires gradients and is trained as any
    other parameter is, by steps with or without backpropagation. What is no such layer (see
    :func:`smezo_cli.zo.quantised.linear_layers`) stays as it is, trained or not.

    Args:
        model: is changed in place, one layer after the other.
        kept_at: positions (int64 (n,), no two alike) in the flat weight, by the name of the weight,
            such as "model.layers.0.mlp.up_proj.weight". Layers without an entry keep none.
        bits: 8 or 4.
        group_size: columns that share a scale.

    Returns:
        The parameters of the kept weights, by name.

    Raises:
        ValueError: a name is not of such a layer, a position is outside of its weight or stands
            twice, or a weight is not finite.
    """
    layers = linear_layers(model, trained=False)
    for name in kept_at:
        if name.removesuffix(".weight") not in layers:
            raise ValueError(f"{name} is not the weight of a linear layer that codes can hold")
    kept: dict[str, nn.Parameter] = {}
    for name in list(layers):
        linear, at = layers.pop(name), kept_at.get(f"{name}.weight")
        if at is not None and len(at):
            at = _checked(f"{name}.weight", at, linear.weight)
        with torch.inference_mode(False), torch.no_grad():
            layer = QuantisedLinear(linear, bits, group_size, at if at is not None else None)
        layer.is_trained = False
        replace(model, name, layer)
        if layer.kept is not None:
            kept[f"{name}.kept"] = layer.kept
        del linear  # its float weights go before those of the next layer are read
    return kept


def _checked(name: str, at: Tensor, weight: Tensor) -> Tensor:
    """Return positions in order, on the device of the weight.

    Raises:
        ValueError: one is outside of the weight, or stands twice.
    """
    if at.is_meta:  # of a plan they are so many, and have no values
        return at
    ordered = at.to(weight.device, torch.int64).sort().values
    if int(ordered[0]) < 0 or int(ordered[-1]) >= weight.numel():
        raise ValueError(f"{name} has {weight.numel()} weights, and a position is outside of it")
    if bool((ordered[1:] == ordered[:-1]).any()):
        raise ValueError(f"a position in {name} stands twice")
    return ordered


@contextmanager
def as_numbers(model: nn.Module) -> Iterator[None]:
    """Inside, layers of codes are ordinary linear layers, so that the model is saved as others are.

    All of them at once: it takes the memory of the float model.
    """
    layers = quantised_layers(model)
    for name, layer in layers.items():
        replace(model, name, layer.plain())
    try:
        yield
    finally:
        for name, layer in layers.items():
            replace(model, name, layer)


def bytes_as_numbers(model: nn.Module) -> int:
    """Return the bytes of a model's parameters as :func:`as_numbers` has them."""
    layers = quantised_layers(model).values()
    own = {id(p) for layer in layers for p in (layer.weight, layer.scales, layer.kept)}
    others = (p for p in model.parameters() if id(p) not in own)
    written = sum(layer.num_weights * layer.dtype.itemsize for layer in layers)
    return written + sum(p.numel() * p.element_size() for p in others)

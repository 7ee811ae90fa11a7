"""Name the trained tensors of a model, with their layers and flat views."""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smezo_cli.zo import dynamo
from smezo_cli.zo.quantised import QuantisedLinear, quantised_layers


@dataclass
class Target:
    """Describe a perturbed tensor: where it is, its stream's name, what a selection says of it.

    Attributes:
        name: of the parameter; names its streams.
        parameter: the weights.
        masked: the mask of the selection applies to it.
        h: threshold of the mask.
        position: its number among the targets.
        rests: the present step leaves it as it is.
        index: int64, sorted: the flat places of the entries that are trained, where a selection
            names them one by one; None: those that the mask takes.
        layer: that holds the parameter, where it is codes; else None.
    """

    name: str
    parameter: nn.Parameter
    masked: bool
    h: float = math.inf
    position: int = 0
    rests: bool = False
    index: Tensor | None = None
    layer: QuantisedLinear | None = None
    _flat: Tensor | None = None

    @property
    def num_trained(self) -> int:
        """Return how many entries a step may change: a whole tensor, or those of ``index``."""
        return self.parameter.numel() if self.index is None else self.index.numel()

    @property
    def flat(self) -> Tensor:
        """Return the weights (or codes) themselves, flat; writing to it writes to the model."""
        p, flat = self.parameter, self._flat
        # Made once: passes keep what they need to know of a tensor with the tensor object.
        if flat is None or flat.data_ptr() != p.data_ptr() or flat.dtype != p.dtype:
            flat = self._flat = p.detach().view(-1)
        return flat


def trainable(
    model: nn.Module, *, codes: bool = False
) -> list[tuple[str, nn.Parameter, QuantisedLinear | None]]:
    """Return the tensors that may be trained: name, parameter, and the layer of codes.

    Those that require gradients and, if ``codes`` says so, the codes of layers that are trained.
    """
    plain = [(dynamo.plain_name(name), p) for name, p in model.named_parameters()]
    layers = quantised_layers(model).values() if codes else ()
    of_codes = {id(layer.weight): layer for layer in layers if layer.is_trained}
    return [
        (name, p, of_codes.get(id(p))) for name, p in plain if p.requires_grad or id(p) in of_codes
    ]


def select(
    model: nn.Module, freeze: list[str], dense: list[str], *, codes: bool = False
) -> list[Target]:
    """Return the tensors that are trained; raise ValueError for globs that match none."""
    named = trainable(model, codes=codes)
    if not named:
        raise ValueError("no parameter of the model requires gradients, so nothing can be trained")
    for name, parameter, layer in named:
        is_float = parameter.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not is_float and layer is None:
            raise ValueError(f"parameter {name} is {parameter.dtype}: float32, bfloat16, float16")
    for key, glob in [*(("freeze", g) for g in freeze), *(("dense", g) for g in dense)]:
        if not any(fnmatch.fnmatchcase(name, glob) for name, *_ in named):
            raise ValueError(f"{key} {glob!r} matches no trainable parameter, e.g. {named[0][0]!r}")
    targets: list[Target] = []
    for name, parameter, layer in named:
        if any(fnmatch.fnmatchcase(name, glob) for glob in freeze):
            continue
        if not parameter.is_contiguous():
            raise ValueError(f"parameter {name} is not contiguous")
        masked = not any(fnmatch.fnmatchcase(name, glob) for glob in dense)
        targets.append(Target(name, parameter, masked, position=len(targets), layer=layer))
    if not targets:
        raise ValueError("no parameter is left to train; freeze fewer")
    return targets


def literal(name: str) -> str:
    """Return a glob that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def number(loss: Tensor) -> float:
    """Return a loss as a Python float."""
    return float(loss.detach())


def check(condition: bool, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def one_of(key: str, got: str | bool, allowed: Sequence[str | bool]) -> None:
    """Raise ValueError unless the value is one of those allowed."""
    check(got in allowed, f"{key}={got}: one of {', '.join(map(str, allowed))}")

"""Linear layers on a CPU by oneDNN, where torch would take a library that is slower on some.

In float32 torch multiplies matrices by MKL, whose fast kernels are for one make of processor.
oneDNN, which torch carries for low precision, is about twice as fast on others. The choice hangs
on the build alone, never on a timing, so that a resumed run computes the same bits.
"""

import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def use_onednn(model: nn.Module) -> int:
    """Give the plain linear layers of a float32 model on a CPU a faster forward without gradients.

    Args:
        model: its :class:`torch.nn.Linear` layers are changed in place; with gradients they compute
            as before.

    Returns:
        How many layers were changed; 0 where this build of torch has no oneDNN.
    """
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # untyped in torch
    if not has_onednn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return 0
    layers = [
        m
        for m in model.modules()
        if type(m) is nn.Linear
        and m.weight.device.type == "cpu"
        and m.weight.dtype == torch.float32
    ]
    for layer in layers:
        layer.__dict__["forward"] = types.MethodType(_forward, layer)
    return len(layers)


@contextmanager
def as_torch_has_it(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers compute as torch would without :func:`use_onednn`."""
    changed = [
        (layer, forward)
        for layer in model.modules()
        if getattr(forward := layer.__dict__.get("forward"), "__func__", None) is _forward
    ]
    for layer, _ in changed:
        del layer.__dict__["forward"]
    try:
        yield
    finally:
        for layer, forward in changed:
            layer.__dict__["forward"] = forward


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return F.linear(x, self.weight, self.bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
    return product

"""Compute the forwards of a low-precision model in float32, one module at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smezo_cli.zo.probe import looks_up_rows, renumbered


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Make a low-precision model compute in float32 within the context, from its own weights.

    Every module that owns tensors below float32 runs with float32 copies of its own, and with
    float32 inputs; copies live while the module's forward runs. It equals ``model.float()``, at the
    memory of one module. A probe (:class:`smezo_cli.zo.probe.FunctionalProbe`) is entered inside of
    it, so that what is copied is the moved weight in the dtype in which it would be stored.
    """
    owners = [m for m in model.modules() if any(map(_is_low, _own(m).values()))]
    held = [m.__dict__.get("forward") for m in owners]
    for module in owners:
        module.__dict__["forward"] = _in_float32(module)
    try:
        yield
    finally:
        for module, forward in zip(owners, held, strict=True):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def _own(module: nn.Module) -> dict[str, Any]:
    return module._parameters | module._buffers


def _is_low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _in_float32(module: nn.Module) -> Callable[..., Any]:
    inner, by_row = module.forward, looks_up_rows(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        parameters, buffers = dict(module._parameters), dict(module._buffers)
        padding = getattr(module, "padding_idx", None)
        try:
            own: dict[str, Any] = dict(parameters)
            if by_row and len(args) == 1 and not kwargs:  # not the whole table for a few rows
                rows, args = renumbered(args[0].to(own["weight"].device))
                own["weight"] = own["weight"].index_select(0, rows)
                module.padding_idx = None  # type: ignore[assignment]  # a position of the old numbering
            module._parameters.update(_as_float32(own))
            module._buffers.update(_as_float32(buffers))
            return inner(*_as_float32(args), **_as_float32(kwargs))
        finally:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            if by_row:
                module.padding_idx = padding  # type: ignore[assignment]  # what it was

    return forward


def _as_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().float() if _is_low(value) else value
    if type(value) in (tuple, list):
        return type(value)(map(_as_float32, value))
    if type(value) is dict:
        return {key: _as_float32(item) for key, item in value.items()}
    return value

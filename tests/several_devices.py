"""Two devices on a machine that has none: tensors of the CPU that say they lie elsewhere.

What an operation is given must lie on one device, as on GPUs, or it raises.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from smezo_cli.zo.turns import Turns

aten = torch.ops.aten
_CPU = torch.device("cpu")
KIND = "maia"  # a kind of device that torch knows the name of, and nobody here has
_MAY_CROSS = {aten._to_copy.default, aten.copy_.default, aten.to.device}
_MAY_INDEX_FROM_CPU = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class Placed(torch.Tensor):
    """A tensor on such a device; its contents are an ordinary one's."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> "Placed":
        # A view of an ordinary tensor stays one in inference mode, where a new tensor would not.
        with torch.inference_mode(inner.is_inference()):
            made: Placed = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=device,
            )
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    # These ask for a driver of the device before they ask anybody else.
    def copy_(self, other: Tensor, non_blocking: bool = False) -> "Placed":
        self.inner.copy_(other.inner if isinstance(other, Placed) else other)
        return self

    def contiguous(self, **kwargs: Any) -> Tensor:
        return Placed(self.inner.contiguous(**kwargs), self.device)

    def tolist(self) -> Any:
        return self.inner.tolist()

    item = tolist

    def __float__(self) -> float:
        return float(self.inner)

    def __int__(self) -> int:
        return int(self.inner)

    def __bool__(self) -> bool:
        return bool(self.inner)

    def __getitem__(self, place: Any) -> Tensor:
        return Placed(self.inner[self._found(place)], self.device)

    def __setitem__(self, place: Any, value: Any) -> None:
        self.inner[self._found(place)] = self._found(value)

    def _found(self, value: Any) -> Any:
        given = [x for x in tree_flatten(value)[0] if isinstance(x, Placed)]
        if any(x.device != self.device for x in given):
            raise RuntimeError(f"indexing: several devices, {self.device} and another")
        return tree_map_only(Placed, lambda x: x.inner, value)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


class _Factories(TorchDispatchMode):
    """Makes what is made on such a device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given: list[Tensor] = []
    asked: list[torch.device] = []
    inner_args, inner_kwargs = _inside((args, kwargs), given, asked)
    placed = [x for x in given if isinstance(x, Placed)]
    devices = {x.device for x in placed}
    if placed and func not in _MAY_CROSS:
        plain = [x for x in given if not isinstance(x, Placed) and x.dim()]
        if len(devices) > 1 or (plain and func not in _MAY_INDEX_FROM_CPU):
            raise RuntimeError(f"{func}: tensors on {[str(x.device) for x in given]}")
    own = args[0].device if func in _MAY_CROSS else next(iter(devices), None)
    where = asked[0] if asked else own
    value = func(*inner_args, **inner_kwargs)
    if asked and placed and where not in devices:
        value = value.clone()
    if where is None or where.type != KIND:
        return value
    return _outside(value, where, {id(x.inner): x for x in placed if x.device == where})


# Trees of tuples, lists and dicts alone: torch's pytree takes four times as long for them.
def _inside(value: Any, given: list[Tensor], asked: list[torch.device]) -> Any:
    """Return a tree with ordinary tensors and the CPU in it; note its tensors and devices."""
    if isinstance(value, Tensor):
        given.append(value)
        return value.inner if isinstance(value, Placed) else value
    if isinstance(value, torch.device):
        asked.append(value)
        return _CPU
    if type(value) is tuple or type(value) is list:
        return type(value)([_inside(item, given, asked) for item in value])
    if type(value) is dict:
        return {key: _inside(item, given, asked) for key, item in value.items()}
    return value


def _outside(value: Any, where: torch.device, known: dict[int, Placed]) -> Any:
    """Return a tree with tensors that say they lie there; those that did already are the same."""
    if isinstance(value, Tensor):
        return known[id(value)] if id(value) in known else Placed(value, where)
    if isinstance(value, tuple | list):
        return type(value)([_outside(item, where, known) for item in value])
    return value


@contextmanager
def two_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[torch.device, torch.device]]:
    """Inside, tensors can be made on two devices more than there are; in lockstep's thread, too."""
    run_second = Turns._run_second

    def inside(*args: Any) -> Any:
        torch._C._set_only_lift_cpu_tensors(True)  # a thread has its own
        with _Factories():
            return run_second(*args)

    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=...) is seen
    try:
        with monkeypatch.context() as patched, _Factories():
            patched.setattr(Turns, "_run_second", inside)
            yield torch.device(KIND, 0), torch.device(KIND, 1)
    finally:
        torch._C._set_only_lift_cpu_tensors(before)

"""Keep ``torch.compile`` away from the forwards that a probe has replaced.

A model that the user has compiled runs as it is written while its losses are measured: dynamo
would trace into the replaced forwards, and compile them anew for every probe.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")

_PREFIX = "_orig_mod."  # of the names of parameters inside of torch.compile(module)


def original(model: nn.Module) -> nn.Module:
    """Return the module inside of ``torch.compile(module)``, or the module itself."""
    inner = model.__dict__.get("_modules", {}).get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else model


def plain_name(name: str) -> str:
    """Return the name that a parameter has in the model before it was compiled."""
    return name.replace(_PREFIX, "")


def is_compiled(model: nn.Module) -> bool:
    """Return whether the model or a part of it was compiled by the user."""
    return any(
        original(module) is not module or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def is_its_error(error: BaseException) -> bool:
    """Return whether the compiler has failed, and not what it compiles."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def is_imported() -> bool:
    """Return whether anything can have been compiled in this process."""
    return "torch._dynamo" in sys.modules


def recompiles(call: Callable[[], Any]) -> bool:
    """Return whether the call meets compiled code that would have to be compiled anew."""
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            call()
    except RuntimeError as error:
        if is_its_error(error) or "fail_on_recompile" in str(error):
            return True
        raise
    return False


@contextmanager
def kept_out() -> Iterator[None]:
    """Inside, all compiled code runs as it is written."""
    with torch.compiler.set_stance("force_eager"):
        yield


class KeptOut:
    """Keeps the user's compiler out of probes, of models and closures that have compiled code.

    Args:
        model: that the probes are of.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.is_needed = is_compiled(model)

    def __call__(self) -> AbstractContextManager[None]:
        """Return a context in which compiled code runs as it is written, where that is needed."""
        return kept_out() if self.is_needed else nullcontext()

    def run(self, call: Callable[[], T]) -> T:
        """Return what the call returns; where the compiler fails it is kept out from then on."""
        try:
            with self():
                return call()
        except Exception as error:
            if self.is_needed or not is_its_error(error):
                raise
        self.is_needed = True
        with self():
            return call()

    def find(self, closure: Callable[[], Any], probe: AbstractContextManager[Any]) -> None:
        """Find out whether a closure calls compiled code with the model inside.

        Args:
            closure: computes a loss.
            probe: a context in which the forwards of the model are replaced.
        """
        self.is_needed = self.is_needed or is_compiled(self._model)
        if self.is_needed or not is_imported():
            return
        try:
            closure()
        except Exception as error:
            if not is_its_error(error):
                raise
            self.is_needed = True
            return
        with probe:
            self.is_needed = recompiles(closure)

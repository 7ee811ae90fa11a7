"""Wrap a model's forward, so that what is trained stands before the text of every row."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


class BeforeText(ABC):
    """Hold a model whose forward is wrapped, and the encoder of what stands before the text.

    Args:
        model: its forward is wrapped in place.
        name: of the module of the model that the encoder becomes.
        encoder: of peft; its embedding is what is trained.
    """

    merges = False

    def __init__(self, model: PreTrainedModel, name: str, encoder: Any) -> None:
        self._model, self._encoder = model, encoder
        model.add_module(name, encoder)
        #: a forward of this model alone, such as accelerate's on several devices; None: its class's
        self._before = model.__dict__.get("forward")
        model.__dict__["forward"] = functools.partial(self._forward, model.forward)

    @abstractmethod
    def _forward(self, inner: Callable[..., Any], input_ids: Tensor, **inputs: Any) -> Any:
        """Run the model's own forward behind what is trained."""

    @property
    def _weight(self) -> nn.Parameter:
        """Return what is trained, (places, numbers a place)."""
        weight: nn.Parameter = self._encoder.embedding.weight
        return weight

    @property
    def saved_bytes(self) -> int:
        """Return the bytes of what is trained alone."""
        return self._weight.numel() * self._weight.element_size()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Take what is trained away within the context."""
        wrapped = self._model.__dict__.pop("forward")
        if self._before is not None:
            self._model.__dict__["forward"] = self._before
        try:
            yield
        finally:
            self._model.__dict__["forward"] = wrapped

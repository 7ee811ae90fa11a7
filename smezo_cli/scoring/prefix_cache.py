"""Keys and values of what all rows begin with, computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class HeldLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # untyped in transformers
    """Keys and values of one sequence, behind which any number of others stand; it never grows."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in transformers
        self.held_keys, self.held_values = self.keys, self.values = keys, values
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values, those held in front of each row's: (rows, heads, positions, size)."""
        rows = len(key_states)
        held = self.held_keys, self.held_values
        keys, values = (one.expand(rows, -1, -1, -1) for one in held)
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


@dataclass(frozen=True)
class Held:
    """Tokens with which rows begin, and what the model has made of them."""

    ids: tuple[int, ...]
    layers: Sequence[HeldLayer]

    def cache(self) -> DynamicCache:
        """For a forward over any number of rows behind the tokens."""
        cache = DynamicCache()
        cache.layers = list(self.layers)
        return cache

    def growing(self, rows: int) -> DynamicCache:
        """For so many rows that go on, token by token."""
        cache = DynamicCache()
        for index, layer in enumerate(self.layers):
            keys = layer.held_keys.expand(rows, -1, -1, -1)
            cache.update(keys, layer.held_values.expand(rows, -1, -1, -1), index)
        return cache

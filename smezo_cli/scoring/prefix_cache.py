"""Compute what sequences have in common once: the begin of all rows, or of a row's candidates."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from smezo_cli.scoring.candidates import Candidates, is_one, num_common
from smezo_cli.scoring.forward import Forward

# A second pass reads all weights (and, under a probe, draws all noise) once more; on a CPU and a
# model of 135M weights that takes the time of 40 (and 200) tokens; this lies between.
SECOND_PASS_TOKENS = 128


class HeldLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # untyped in transformers
    """Put the keys and values of one sequence before those of any number of others; never grow."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in transformers
        self.held_keys, self.held_values = self.keys, self.values = keys, values
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values behind those held: (rows, heads, positions, size) each."""
        rows = len(key_states)
        held = self.held_keys, self.held_values
        keys, values = (one.expand(rows, -1, -1, -1) for one in held)
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


@dataclass(frozen=True)
class Held:
    """Hold the tokens with which rows begin, and their keys and values."""

    ids: tuple[int, ...]
    layers: Sequence[HeldLayer]

    def cache(self) -> DynamicCache:
        """Return a cache for a forward over any number of rows behind the tokens."""
        cache = DynamicCache()
        cache.layers = list(self.layers)
        return cache

    def growing(self, rows: int) -> DynamicCache:
        """Return a cache for so many rows that go on, token by token."""
        cache = DynamicCache()
        for index, layer in enumerate(self.layers):
            keys = layer.held_keys.expand(rows, -1, -1, -1)
            cache.update(keys, layer.held_values.expand(rows, -1, -1, -1), index)
        return cache


def common_begin(rows: Sequence[Candidates]) -> tuple[int, ...]:
    """Return the tokens with which all rows begin, less one of the shortest: its logits are read.

    Rows that were cut on the left begin with others, and are left out.
    """
    whole = [c.full[0] if c.full else c.context for c in rows if not c.truncated]
    if not whole or rows[0].mask is not None:
        return ()
    most = min(c.prefix if c.full else len(c.context) - 1 for c in rows if not c.truncated)
    return whole[0][: max(0, min(most, num_common(whole)))]


@torch.no_grad()
def hold(forward: Forward, ids: tuple[int, ...], cache: DynamicCache) -> Held:
    """Run the model over the tokens once, and return the keys and values that it computed.

    Args:
        forward: runs the model.
        ids: the tokens.
        cache: an empty one, which is filled.
    """
    with forward.computing():
        _fill(forward, [ids], cache)
    filled: list[Any] = cache.layers
    return Held(ids, [HeldLayer(layer.keys, layer.values) for layer in filled])


def _fill(forward: Forward, sequences: Sequence[Sequence[int]], cache: DynamicCache) -> None:
    """Run the model for what it leaves in the cache."""
    forward.logits_at(
        [(0, 0)],  # one logit at one place is as few as there can be
        (forward.pad_id,),
        input_ids=forward.padded(sequences),
        past_key_values=cache,
        use_cache=True,
    )


def num_tokens(row: Candidates, held: Held | None) -> int:
    """Return how many tokens a forward takes for the row; fewer where what is held serves it."""
    if held is None:
        return row.num_tokens
    size = len(held.ids)
    sequences = (*row.full, row.context) if row.context else row.full
    if any(ids[:size] != held.ids for ids in sequences):
        return row.num_tokens
    each = row.width - size
    return min(row.num_tokens, each if is_one(row) else each * len(row.full))


def serving(held: Held | None, batch: Sequence[Candidates]) -> Held | None:
    """Return what is held where it saves tokens for every row of the batch, else None."""
    if held is None or torch.is_grad_enabled():
        return None
    return held if all(num_tokens(c, held) < c.num_tokens for c in batch) else None


def inputs_behind(
    forward: Forward, sequences: Sequence[Sequence[int]], held: Held | None
) -> dict[str, Any]:
    """Return a forward's inputs for sequences, which begin with what is held, if anything is."""
    if held is None:
        return {"input_ids": forward.padded(sequences), "use_cache": False}
    size = len(held.ids)
    rests = [ids[size:] for ids in sequences]
    longest = max(map(len, rests))
    # Behind the end of its sequence no position beyond the model's last may be named.
    places = [[size + min(j, len(rest) - 1) for j in range(longest)] for rest in rests]
    return {
        "input_ids": forward.padded(rests),
        "attention_mask": forward.padded([[1] * len(ids) for ids in sequences], 0),
        "position_ids": forward.tensor(places),
        "past_key_values": held.cache(),
        "use_cache": True,
    }


def logits_behind_prefixes(
    forward: Forward, batch: Sequence[Candidates], cache: DynamicCache
) -> Tensor:
    """Return the logits before each option token; what a row's candidates share runs once.

    Args:
        forward: runs the model.
        batch: rows with candidates of one or more tokens.
        cache: an empty one, as :func:`cache_that_saves` gives it.

    Returns:
        (option tokens, vocabulary), candidate after candidate.
    """
    prefixes = [c.full[0][: c.prefix] for c in batch]
    with forward.giving(prefixes, [0] * len(prefixes)):
        _fill(forward, prefixes, cache)
    owner = [i for i, c in enumerate(batch) for _ in c.full]
    rows = forward.tensor(owner)
    filled: list[Any] = cache.layers
    for layer in filled:  # each on its device
        layer.batch_select_indices(rows.to(layer.keys.device))
    rests = [ids[c.prefix : -1] for c in batch for ids in c.full]
    options = [n for c in batch for n in c.num_option]
    width = max(map(len, prefixes))
    seen = [
        [1] * len(prefixes[i]) + [0] * (width - len(prefixes[i])) + [1] * len(rest)
        for i, rest in zip(owner, rests, strict=True)
    ]
    longest = max(map(len, rests))
    positions = [
        # Behind the end of its sequence no position beyond the model's last may be named.
        [len(prefixes[i]) + min(j, len(rest) - 1) for j in range(longest)]
        for i, rest in zip(owner, rests, strict=True)
    ]
    places = [
        (i, p)
        for i, (rest, n) in enumerate(zip(rests, options, strict=True))
        for p in range(len(rest) - n, len(rest))
    ]
    whole = [ids[:-1] for c in batch for ids in c.full]
    with forward.giving(whole, [c.prefix for c in batch for _ in c.full]):
        return forward.logits_at(
            places,
            None,
            input_ids=forward.padded(rests),
            attention_mask=forward.padded(seen, 0),
            position_ids=forward.tensor(positions),
            past_key_values=cache,
            use_cache=True,
        )


def cache_that_saves(
    forward: Forward, batch: Sequence[Candidates], always: bool = False
) -> DynamicCache | None:
    """Return an empty cache if running common prefixes first saves tokens and is exact, else None.

    Args:
        forward: runs the model.
        batch: rows with candidates.
        always: also where it saves too little to be worth a second pass.
    """
    lengths = [(len(ids) - 1, c.prefix) for c in batch for ids in c.full]
    longest_prefix = max(prefix for _, prefix in lengths)
    longest_rest = max(length - prefix for length, prefix in lengths)
    together = len(batch) * longest_prefix + len(lengths) * longest_rest
    apart = len(lengths) * max(length for length, _ in lengths)
    if min(prefix for _, prefix in lengths) < 1:
        return None
    if together + SECOND_PASS_TOKENS >= apart and not always:
        return None
    return cache_for(forward, longest_prefix + longest_rest)


def cache_for(forward: Forward, tokens: int) -> DynamicCache | None:
    """Return an empty cache if sequences of so many tokens may be computed in two parts."""
    model = forward.model
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return None
    if (
        not {"past_key_values", "position_ids"}
        <= inspect.signature(type(model).forward).parameters.keys()
    ):
        return None
    cache = DynamicCache(config=model.config)
    width = tokens + forward.places_before
    # Recurrent states cannot hide a prefix's padding; a window counts it as tokens.
    exact = [
        type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > width)
        for layer in cache.layers
    ]
    return cache if exact and all(exact) else None

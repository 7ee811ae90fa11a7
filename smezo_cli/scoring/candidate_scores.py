"""Compute the log-probabilities of candidates, and hidden states, by forwards of a model.

Nothing is computed that a loss does not read. Where every label is one token after the same
prefix, one forward per row gives all scores, and only the label rows of the output layer are
computed: the softmax over candidates cancels what the others would have added. Longer candidates
run their common prefix once where no gradient is asked for. The output layer sees only the
positions whose logits are read.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smezo_cli.errors import UserError
from smezo_cli.scoring import prefix_cache
from smezo_cli.scoring.batching import Batching
from smezo_cli.scoring.candidates import Candidates, shared_label_ids
from smezo_cli.scoring.forward import Forward
from smezo_cli.scoring.prefix_cache import Held, inputs_behind, logits_behind_prefixes


@dataclass(frozen=True)
class Sharing:
    """Say what sequences share: a forward, and tokens that are computed once for several.

    Attributes:
        batching: which sequences share a forward.
        held: what all rows begin with, if its keys and values are held.
        always_caches: run what a row's candidates have in common once, also where that saves
            too little to be worth it.
    """

    batching: Batching
    held: Held | None = None
    always_caches: bool = False


def scores(
    forward: Forward, batch: Sequence[Candidates], sharing: Sharing, *, sums: bool = False
) -> Tensor:
    """Return (batch, most candidates of a row) scores in float32, -inf where a row has fewer.

    A score is the mean log-probability of the candidate's tokens; in classification it is known
    up to a constant of the row.

    Args:
        forward: runs the model.
        batch: rows of one kind.
        sharing: what the candidates share.
        sums: the sum over a candidate's tokens in place of the mean.
    """
    batching = sharing.batching
    if batch[0].mask is not None:
        return batching.in_forwards(
            [c.context for c in batch],
            lambda chosen: _mask_logits(forward, [batch[i] for i in chosen]),
        )
    if (label_ids := shared_label_ids(batch)) is not None:
        return batching.in_forwards(
            [c.full[0] for c in batch],
            lambda chosen: _next_token_logits(
                forward, [batch[i] for i in chosen], label_ids, sharing.held
            ),
        )
    counts = [n for c in batch for n in c.num_option]
    if not counts:
        return torch.full((len(batch), 1), -math.inf, device=forward.device)
    found = log_p(forward, batch, sharing)
    means = found if sums else found / forward.tensor(counts)
    rows = torch.split(means, [len(c.full) for c in batch])
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-math.inf)


def _next_token_logits(
    forward: Forward, batch: Sequence[Candidates], label_ids: Sequence[int], held: Held | None
) -> Tensor:
    """Return the logits of labels of one token, by one forward: (batch, labels) float32."""
    held = prefix_cache.serving(held, batch)
    prefixes = [c.full[0][:-1] for c in batch]
    start = 0 if held is None else len(held.ids)
    last = [len(ids) - 1 - start for ids in prefixes]
    read = sorted(set(last))
    # On the CPU, from where it may index the states of a last layer on any device.
    kept, column = torch.tensor(read), forward.tensor([read.index(p) for p in last])
    rows = forward.tensor(label_ids)
    # Right-padded: a causal model's earlier positions do not see it, so no mask is needed.
    inputs = inputs_behind(forward, prefixes, held) | {"logits_to_keep": kept}
    giving = forward.giving(prefixes) if held is None else nullcontext()
    with giving, forward.vocabulary(rows) as narrowed:
        logits = forward.model(**inputs).logits  # (batch, kept, labels)
    if not narrowed:
        logits = logits[..., rows]
    found: Tensor = logits[torch.arange(len(batch), device=logits.device), column].float()
    return found


def _mask_logits(forward: Forward, batch: Sequence[Candidates]) -> Tensor:
    """Return the label words' logits at the masks, by one forward: (batch, labels) float32."""
    (label_ids,) = {tuple(ids[c.mask] for ids in c.full) for c in batch if c.mask is not None}
    contexts = [c.context for c in batch]
    places = [(i, c.mask) for i, c in enumerate(batch) if c.mask is not None]
    with forward.giving(contexts):
        return forward.logits_at(
            places,
            label_ids,
            input_ids=forward.padded(contexts),
            # Such a model looks both ways: padding must be hidden from it.
            attention_mask=forward.padded([[1] * len(ids) for ids in contexts], 0),
        ).float()


def log_p(forward: Forward, batch: Sequence[Candidates], sharing: Sharing) -> Tensor:
    """Return the sum of the log-probabilities of each candidate's tokens, row after row: float32.

    Args:
        forward: runs the model.
        batch: rows with any number of candidates of any length.
        sharing: what the candidates share.
    """
    sequences = [ids for c in batch for ids in c.full]
    options = [n for c in batch for n in c.num_option]

    held = prefix_cache.serving(sharing.held, batch)
    cache = None
    if held is None and not torch.is_grad_enabled() and sharing.batching.caches:
        cache = prefix_cache.cache_that_saves(forward, batch, sharing.always_caches)

    def sums(logits: Tensor, chosen: Sequence[int]) -> Tensor:
        targets = [token for i in chosen for token in sequences[i][-options[i] :]]
        each_token = -F.cross_entropy(logits.float(), forward.tensor(targets), reduction="none")
        each = torch.split(each_token, [options[i] for i in chosen])
        return torch.stack([of_one.sum() for of_one in each])

    if cache is not None:
        return sums(logits_behind_prefixes(forward, batch, cache), range(len(sequences)))

    def together(chosen: list[int]) -> Tensor:
        of_chosen = [sequences[i] for i in chosen], [options[i] for i in chosen]
        return sums(_option_logits(forward, *of_chosen, held), chosen)

    return sharing.batching.in_forwards(sequences, together)


def _option_logits(
    forward: Forward,
    candidates: Sequence[Sequence[int]],
    options: Sequence[int],
    held: Held | None,
) -> Tensor:
    """Return logits before each option token, (option tokens, vocabulary)."""
    # Logits at position p speak of token p + 1: the last token is never read.
    sequences = [ids[:-1] for ids in candidates]
    start = 0 if held is None else len(held.ids)
    places = [
        (i, p - start)
        for i, (ids, n) in enumerate(zip(sequences, options, strict=True))
        for p in range(len(ids) - n, len(ids))
    ]
    with forward.giving(sequences) if held is None else nullcontext():
        return forward.logits_at(places, None, **inputs_behind(forward, sequences, held))


def hidden_states(forward: Forward, batch: Sequence[Candidates], batching: Batching) -> Tensor:
    """Return what enters the output layer at each prompt's last token, or mask: (batch, hidden).

    Raises:
        UserError: the model has no output layer that can be asked.
    """
    masked = batch[0].mask is not None
    prompts = [c.context if masked else c.full[0][: -c.num_option[0]] for c in batch]
    at = [len(p) - 1 if c.mask is None else c.mask for p, c in zip(prompts, batch, strict=True)]

    def together(chosen: list[int]) -> Tensor:
        return _hidden_at(forward, [prompts[i] for i in chosen], [at[i] for i in chosen])

    return batching.in_forwards(prompts, together)


def _hidden_at(forward: Forward, prompts: Sequence[Sequence[int]], at: Sequence[int]) -> Tensor:
    places = list(enumerate(at))
    seen: list[Tensor] = []
    if forward.head is None:
        raise UserError(
            f"method.l2: a probe reads what enters the output layer, and "
            f"{type(forward.model).__name__} has none that gives its logits alone: choose another "
            "method, such as method=zero_shot."
        )
    handle = forward.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        forward.logits_at(
            places,
            (forward.pad_id,),
            input_ids=forward.padded(prompts),
            attention_mask=forward.padded([[1] * len(ids) for ids in prompts], 0),
        )
    finally:
        handle.remove()
    sequences, positions = forward.tensor(list(zip(*places, strict=True)))
    hidden = seen[0]
    return hidden[sequences.to(hidden.device), positions.to(hidden.device)].to(forward.device)

"""Generate greedy answers, as MeZO does for SQuAD and DROP (arXiv 2305.17333, appendix E).

Not by the model's own `generate`: that takes up whatever a checkpoint's generation settings ask
for (repetition penalties, sampling), and then is no longer greedy.
"""

import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smezo_cli.scoring.batching import Batching
from smezo_cli.scoring.forward import Forward
from smezo_cli.scoring.prefix_cache import Held
from smezo_cli.scoring.tokenization import decoded
from smezo_cli.scoring.tokens import padding_id


@torch.no_grad()
def answers(
    forward: Forward,
    tokenizer: Any,
    contexts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batching: Batching,
    held: Held | None,
) -> list[str | None]:
    """Return the :func:`greedy` answer of each context, continued in batches where that is right.

    Args:
        forward: runs a causal language model.
        tokenizer: its own.
        contexts: token ids; all begin with what is held.
        max_new_tokens: at most so many tokens a context.
        batching: which contexts share a forward.
        held: keys and values of what all contexts begin with, if anything is held.
    """
    size = 0 if held is None else len(held.ids)
    texts: dict[int, str | None] = {}
    with forward.computing():
        for chosen in batching.groups(list(map(len, contexts))):
            found = greedy(
                forward.model,
                tokenizer,
                [contexts[i][size:] for i in chosen],
                max_new_tokens,
                past=None if held is None else held.growing(len(chosen)),
                num_past=size,
                caches=batching.caches,
            )
            texts |= zip(chosen, found, strict=True)
    return [texts[i] for i in range(len(contexts))]


@torch.no_grad()
def greedy(
    model: nn.Module,
    tokenizer: Any,
    contexts: Sequence[Sequence[int]],
    max_new_tokens: int,
    past: Any = None,
    num_past: int = 0,
    caches: bool = True,
) -> list[str | None]:
    """Continue contexts by the most probable token, to the first newline or end of text.

    Contexts are padded on the left and continued together.

    Args:
        model: a causal language model.
        tokenizer: its own.
        contexts: token ids, none empty.
        max_new_tokens: at most so many tokens a context.
        past: a key-value cache of what stands before all contexts; it grows.
        num_past: tokens in it.
        caches: use a key-value cache where the model has one.

    Returns:
        One line for each context, stripped, without special tokens; None where the logits of a
        token of it are not finite, for then no token is the most probable one.
    """
    ends = _ends(model, tokenizer)
    answers: list[list[int]] = [[] for _ in contexts]
    open_rows, lost = set(range(len(contexts))), set[int]()
    steps = next_tokens(model, padding_id(tokenizer, model), contexts, past, num_past, caches)
    for logits, best in itertools.islice(steps, max_new_tokens):
        # The largest of logits with a NaN among them is that NaN.
        is_known = logits.gather(1, best[:, None])[:, 0].isfinite()
        for i, token in enumerate(torch.where(is_known, best, -1).tolist()):
            if i not in open_rows:
                continue
            if token < 0:
                lost.add(i)
            if token < 0 or token in ends:
                open_rows.remove(i)
                continue
            answers[i].append(token)
            # By the text, not by a token: a newline may be part of a longer one.
            if "\n" in decoded(tokenizer, answers[i]):
                open_rows.remove(i)
        if not open_rows:
            break
    texts = [decoded(tokenizer, answer).partition("\n")[0].strip() for answer in answers]
    return [None if i in lost else text for i, text in enumerate(texts)]


def next_tokens(
    model: nn.Module,
    pad: int,
    contexts: Sequence[Sequence[int]],
    past: Any = None,
    num_past: int = 0,
    caches: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Continue contexts by the most probable token, without end: no token ends a text here.

    Args:
        model: a causal language model.
        pad: id of the token that pads.
        contexts: token ids, none empty.
        past: a key-value cache of what stands before all contexts; it grows.
        num_past: tokens in it.
        caches: use a key-value cache where the model has one.

    Yields:
        For each step the logits (contexts, vocabulary) and the likeliest tokens (contexts,).
    """
    device = next(model.parameters()).device
    names = inspect.signature(type(model).forward).parameters
    width = max(map(len, contexts))
    padding = [width - len(context) for context in contexts]
    ids = torch.tensor(
        [[pad] * n + list(c) for n, c in zip(padding, contexts, strict=True)], device=device
    )
    seen = [[1] * num_past + [0] * n + [1] * (width - n) for n in padding]
    mask = torch.tensor(seen, device=device)
    step = ids
    while True:
        inputs: dict[str, Any] = {"input_ids": step, "attention_mask": mask, "use_cache": caches}
        if "position_ids" in names:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
        if past is not None:
            inputs["past_key_values"] = past
        output = model(**inputs, logits_to_keep=1)
        past = getattr(output, "past_key_values", None) if caches else None
        logits = output.logits[:, -1]
        best = logits.argmax(-1)
        yield logits, best
        ids = torch.cat([ids, best[:, None]], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(contexts), 1)], dim=1)
        step = ids if past is None else best[:, None]


def _ends(model: nn.Module, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text: the tokenizer's and those of the checkpoint's settings."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list | tuple) else [named])}
    return ends - {None}

"""Encode rows and their candidate answers as token ids."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import nn

from smezo_cli.errors import UserError
from smezo_cli.scoring import tokenization
from smezo_cli.scoring.tokens import token_ids


class RowLike(Protocol):
    """State what scoring reads of a row; :class:`smezo_cli.tasks.Row` has it."""

    @property
    def fields(self) -> Mapping[str, str]: ...
    @property
    def label(self) -> int: ...
    @property
    def id(self) -> str: ...
    @property
    def options(self) -> tuple[str, ...]: ...
    @property
    def right(self) -> frozenset[int]: ...
    @property
    def answers(self) -> tuple[str, ...]: ...


class PromptLike(Protocol):
    """State what scoring reads of a prompt; :class:`smezo_cli.tasks.Prompt` has it."""

    @property
    def template(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def is_masked(self) -> bool: ...
    @property
    def base(self) -> "PromptLike | None": ...
    def context(self, fields: Mapping[str, str]) -> str: ...
    def candidates(self, row: Any) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Candidates:
    """Hold the token ids of one row and its candidates.

    Attributes:
        full: ids of context and candidate, one sequence a candidate; for a masked prompt the whole
            sentence with the label in its place. Empty where a generation row has no answer.
        num_option: how many tokens at the end of each are the candidate's.
        label: index of the right one; -1 where it is not known.
        truncated: tokens were cut to fit.
        kind: classification, choice or generation.
        right: all that count as right, where these are more than the label.
        words: the candidates as the user wrote them; in generation ().
        answers: reference answers of a generation row.
        context: ids of what generation continues; of a masked prompt the sentence with its mask.
        max_new_tokens: of an answer in generation, at most.
        mask: position of the mask of a masked prompt, else None.
        num_merged: candidates whose first characters share a token with the context's last.
        id: the row's.
        base: with a calibrated prompt the candidates behind its domain-conditional prompt.
        part: in a mixture the name of the part that the row is of.
    """

    full: tuple[tuple[int, ...], ...]
    num_option: tuple[int, ...]
    label: int
    truncated: bool
    kind: str = "classification"
    right: frozenset[int] = frozenset()
    words: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    context: tuple[int, ...] = ()
    max_new_tokens: int = 0
    mask: int | None = None
    num_merged: int = 0
    id: str = ""
    base: "Candidates | None" = None
    part: str = field(default="", repr=False)  # the id says it; by repr scores are found again

    @property
    def width(self) -> int:
        """Return the number of tokens of the longest sequence."""
        return max(map(len, self.full), default=len(self.context))

    @property
    def num_tokens(self) -> int:
        """Return how many tokens a forward without gradients takes."""
        if is_one(self):
            return self.width
        return self.prefix + (self.width - self.prefix) * len(self.full)

    @cached_property
    def shares_prefix(self) -> bool:
        """Say whether one sequence gives all scores: labels of one token, or a mask."""
        if self.mask is not None:
            return True
        prefix = self.full[0][:-1]
        return set(self.num_option) == {1} and all(ids[:-1] == prefix for ids in self.full)

    @cached_property
    def prefix(self) -> int:
        """Return how many leading tokens all candidates share, less the last before an option.

        The logits of that one are read, so it belongs to what runs once a candidate.
        """
        if not self.full:
            return 0
        before = min(len(ids) - n for ids, n in zip(self.full, self.num_option, strict=True)) - 1
        return min(before, num_common(self.full))

    @property
    def gold(self) -> int:
        """Return the index of the candidate that is trained on; -1 where it is not known."""
        if self.kind == "generation":
            return 0 if self.full else -1
        return self.label

    @property
    def correct(self) -> frozenset[int]:
        """Return the indices that count as right; none for generation or an unknown label."""
        has_label = self.kind != "generation" and self.label >= 0
        return self.right | {self.label} if has_label else self.right

    @property
    def is_labelled(self) -> bool:
        """Say whether there is a label or an answer to compare a prediction with."""
        return bool(self.answers if self.kind == "generation" else self.correct)

    def gold_alone(self) -> "Candidates":
        """Return the row with the gold candidate alone."""
        gold = self.gold
        return dataclasses.replace(
            self, full=(self.full[gold],), num_option=(self.num_option[gold],), label=0
        )


def encode(
    rows: Sequence[RowLike],
    prompt: PromptLike,
    tokenizer: Any,
    max_length: int,
    kind: str = "classification",
    max_new_tokens: int = 50,
) -> list[Candidates]:
    """Return the token ids of every candidate; long ones are cut on the left, but keep the BOS.

    Args:
        rows: a label of -1 and no answers are fine: such rows can be scored, not trained on.
        prompt: with a mask only for classification.
        tokenizer: of the model.
        max_length: tokens of the context window.
        kind: classification, choice or generation.
        max_new_tokens: in generation, tokens that a prompt leaves free in the window, as in MeZO.

    Raises:
        UserError: a candidate adds no token or leaves no room for one before it; a masked prompt
            that does not fit the tokenizer or the kind.
    """
    encoded = _encode(rows, prompt, tokenizer, max_length, kind, max_new_tokens)
    if prompt.base is None:
        return encoded
    bases = [
        dataclasses.replace(c, label=-1, right=frozenset(), id="")
        for c in _encode(rows, prompt.base, tokenizer, max_length, kind, begins=True)
    ]
    one_of = {base: base for base in bases}  # most rows have the same one
    return [
        dataclasses.replace(c, base=one_of[base]) for c, base in zip(encoded, bases, strict=True)
    ]


def _encode(
    rows: Sequence[RowLike],
    prompt: PromptLike,
    tokenizer: Any,
    max_length: int,
    kind: str,
    max_new_tokens: int = 50,
    *,
    begins: bool = False,
) -> list[Candidates]:
    """Encode rows under one prompt; with `begins` an empty context is the begin of a text."""
    if prompt.is_masked:
        return _encode_masked(rows, prompt, tokenizer, max_length, kind)
    limit = max_length
    if kind == "generation":
        limit -= max_new_tokens
        if limit < 2:
            raise UserError(
                f"task.max_new_tokens={max_new_tokens} leaves no room for a prompt in "
                f"model.max_length={max_length}; lower it."
            )
    contexts = [prompt.context(row.fields) for row in rows]
    texts = [
        () if kind == "generation" and not row.answers else prompt.candidates(row) for row in rows
    ]
    context_ids = token_ids(tokenizer, contexts)
    text_ids = iter(token_ids(tokenizer, list(itertools.chain(*texts))))
    # Where a tokenizer puts nothing before a text, the token that parts texts stands there.
    bos = tokenizer.bos_token_id
    start = (tokenizer.eos_token_id if bos is None else bos) if begins else None
    encoded = []
    for i, row in enumerate(rows):
        context = context_ids[i]
        full, num_option, num_merged = [], [], 0
        longest = len(context) if kind == "generation" else 0
        for text in texts[i]:
            ids = next(text_ids)
            if start is not None and not context_ids[i]:
                context, ids = [start], [start, *ids]
            extra, is_merged = _added(ids, context)
            if extra == len(ids):
                raise UserError(_nothing_before(text, prompt, row.id, begins=begins))
            if not 0 < extra < limit:
                raise UserError(_unscorable(text[len(contexts[i]) :], extra, limit, kind, row.id))
            num_merged += is_merged
            longest = max(longest, len(ids))
            full.append(_fitted(ids, limit, bos))
            num_option.append(extra)
        if kind == "classification" and len(set(full)) < len(full):
            raise UserError(
                f"two of the labels {', '.join(map(repr, prompt.labels))} are the same tokens "
                "behind their prompt; choose other task.labels."
            )
        encoded.append(
            Candidates(
                tuple(full),
                tuple(num_option),
                row.label,
                longest > limit,
                kind,
                right=row.right,
                words=row.options if kind == "choice" else prompt.labels,
                answers=row.answers,
                context=_fitted(context, limit, bos) if kind == "generation" else (),
                max_new_tokens=max_new_tokens if kind == "generation" else 0,
                num_merged=num_merged,
                id=row.id,
            )
        )
    return encoded


def _added(ids: list[int], context: list[int]) -> tuple[int, bool]:
    """Return how many tokens a candidate adds to its context, and whether one is merged with it.

    As in MeZO. A tokenizer may merge across the border; then the candidate begins with the first
    token that differs.
    """
    if ids[: len(context)] == context:
        return len(ids) - len(context), False
    extra = len(ids) - num_common([ids, context])
    return extra, extra > 0


def _fitted(ids: list[int], limit: int, bos: int | None) -> tuple[int, ...]:
    """Cut tokens on the left down to the limit; a BOS in front stays."""
    if len(ids) <= limit:
        return tuple(ids)
    keeps_bos = bos is not None and ids[0] == bos
    return tuple([ids[0], *ids[1 - limit :]] if keeps_bos else ids[-limit:])


def _nothing_before(text: str, prompt: PromptLike, row: str, *, begins: bool) -> str:
    if begins:
        return (
            f"task.sfc_prompt={prompt.template!r} is no token of the model's tokenizer, "
            "which has none for the begin of a text either: give a template with a text."
        )
    return (
        f"row {row}: no token stands before {text!r}; choose a task.prompt that shows more than "
        "what may be empty."
    )


def _unscorable(option: str, extra: int, limit: int, kind: str, row: str) -> str:
    what = f"{option!r} takes {extra} tokens after its prompt"
    if kind == "classification":
        return f"{what}; choose other task.labels."
    cause = f"at least 1 is needed, and fewer than {limit} (model.max_length"
    cause += " less task.max_new_tokens)" if kind == "generation" else ")"
    return f"row {row}: {what}, and {cause}; mend the row, task.prompts or model.max_length."


def _encode_masked(
    rows: Sequence[RowLike], prompt: PromptLike, tokenizer: Any, max_length: int, kind: str
) -> list[Candidates]:
    """Encode rows for a masked model: one sequence a row, each label one token for the mask."""
    shown = f"task.prompt={prompt.template!r}"
    mask = tokenizer.mask_token_id
    if kind != "classification":
        raise UserError(
            f"{shown}: a {{mask}} is for task.kind=classification, not for {kind}; leave it out."
        )
    if mask is None:
        raise UserError(
            f"{shown} has a {{mask}} and the model's tokenizer has none; choose a masked model "
            "(such as model=roberta-large), or a prompt that ends where the label word follows."
        )
    # As in a sentence: a blank goes before the word.
    word_ids = tokenization.encoded(
        tokenizer, [f" {w}" for w in prompt.labels], add_special_tokens=False
    )
    for word, ids in zip(prompt.labels, word_ids, strict=True):
        if len(ids) != 1:
            raise UserError(
                f"{word!r} takes {len(ids)} tokens, and one mask stands for one; choose other "
                "task.labels."
            )
        if word_ids.count(ids) > 1:
            raise UserError(
                f"{word!r} is the same token as another label; choose other task.labels."
            )
    # A mask's name that a text holds is that text's own affair: it must not become a mask.
    texts = []
    for row in rows:
        for name, text in row.fields.items():
            if tokenizer.mask_token in text:
                raise UserError(
                    f"row {row.id}: field {name!r} holds {tokenizer.mask_token!r}, which this "
                    "model reads as its mask; mend the row."
                )
        texts.append(prompt.context({**row.fields, "mask": tokenizer.mask_token}))
    first = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    last = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    encoded = []
    for row, ids in zip(rows, token_ids(tokenizer, texts, goes_on=False), strict=True):
        if ids.count(mask) != 1:
            raise UserError(f"{shown} must have one {{mask}}, not {ids.count(mask)}.")
        head, tail = int(ids[0] in first), int(ids[-1] in last)
        if head + 1 + tail > max_length:
            raise UserError(f"model.max_length={max_length} leaves no room for a mask; raise it.")
        over = max(0, len(ids) - max_length)
        # On the left as elsewhere; where the mask stands in the way, the rest behind it.
        left = min(over, ids.index(mask) - head)
        end = len(ids) - tail
        ids = ids[:head] + ids[head + left : end - (over - left)] + ids[end:]
        at = ids.index(mask)
        encoded.append(
            Candidates(
                tuple((*ids[:at], word[0], *ids[at + 1 :]) for word in word_ids),
                (1,) * len(word_ids),
                row.label,
                over > 0,
                kind,
                right=row.right,
                words=prompt.labels,
                context=tuple(ids),
                mask=at,
                id=row.id,
            )
        )
    return encoded


def is_one(row: Candidates) -> bool:
    """Say whether one sequence gives all that is asked of the row."""
    return not row.full or row.shares_prefix


def shared_label_ids(batch: Sequence[Candidates]) -> tuple[int, ...] | None:
    """Return the labels' last tokens where all rows share them and need no other; else None."""
    if batch[0].kind != "classification":
        return None
    if batch[0].mask is not None:
        return tuple(ids[batch[0].mask] for ids in batch[0].full)
    labels = {tuple(ids[-1] for ids in c.full) for c in batch}
    return labels.pop() if len(labels) == 1 and all(c.shares_prefix for c in batch) else None


def num_common(sequences: Sequence[Any]) -> int:
    """Return how many leading tokens all sequences have in common."""
    # The first and the last in order differ as early as any two.
    first, last = min(sequences), max(sequences)
    pairs = enumerate(zip(first, last, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))


def check_family(row: Candidates, model: nn.Module) -> None:
    """Raise UserError for a prompt that the model would take in and answer with nonsense."""
    name = type(model).__name__
    if name.endswith("ForMaskedLM") == (row.mask is not None):
        return
    if row.mask is None:
        raise UserError(
            f"task.prompt has no {{mask}}, and {name} fills masks only: choose a prompt such "
            'as task.prompt="{text} It was {mask} .", or a causal model.'
        )
    raise UserError(
        f"task.prompt has a {{mask}}, and {name} fills none: choose a prompt that ends where "
        "the label word follows, or a masked model such as model=roberta-large."
    )


def split_by_length(batch: Sequence[Candidates]) -> list[Sequence[Candidates]]:
    """Split a batch into two parts of like length if that saves a sixth of the padded tokens.

    A CPU's time goes with the tokens; a GPU would rather have one launch.
    """
    ordered = sorted(batch, key=lambda c: -c.num_tokens)
    whole = len(ordered) * ordered[0].num_tokens
    cost = [
        k * ordered[0].num_tokens + (len(ordered) - k) * ordered[k].num_tokens
        for k in range(1, len(ordered))
    ]
    if not cost or min(cost) > whole * 5 / 6:
        return [batch]
    k = 1 + cost.index(min(cost))
    return [ordered[:k], ordered[k:]]

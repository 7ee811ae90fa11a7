"""Candidates scored by a language model (MeZO, arXiv 2305.17333, appendix E), and the losses.

A row's candidates are its context followed by each label word (classification), by each of its
own options (choice) or by its answer (generation); a candidate's score is the mean log-probability
of its tokens behind the context. Classification trains on the cross-entropy over the scores,
choice and generation on the mean of -log p over the gold candidates' tokens.

Nothing is computed that a loss does not read. Where every label is one token after the same
prefix, one forward per row gives all scores, and only the label rows of the output layer are
computed: the softmax over candidates cancels what the others would have added. Longer candidates
run their common prefix once where no gradient is asked for. The output layer sees only the
positions whose logits are read.
"""

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from smezo_cli import generation, metrics, tokenization
from smezo_cli.errors import UserError
from smezo_cli.probe import only_rows

EVAL_TOKENS = 512  # padded tokens in an evaluation batch: activations stay in a CPU's cache
EVAL_TOKENS_GPU = 4096  # a GPU would rather have few launches; bounds the logits kept at once
EVAL_ANSWERS = 16  # rows generated together: each token reads all weights once for all of them
# A second pass reads all weights (and, under a probe, draws all noise) once more; on a CPU and a
# model of 135M weights that takes the time of 40 (and 200) tokens; this lies between.
SECOND_PASS_TOKENS = 128


class RowLike(Protocol):
    """See :class:`smezo_cli.tasks.Row`."""

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
    """See :class:`smezo_cli.tasks.Prompt`."""

    @property
    def template(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def is_masked(self) -> bool: ...
    def context(self, fields: Mapping[str, str]) -> str: ...
    def candidates(self, row: Any) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Candidates:
    """One row as token ids.

    Attributes:
        full: ids of context and candidate, one sequence a candidate; of a masked prompt the whole
            sentence with the label in its place. Empty where a generation row has no answer.
        num_option: how many tokens at the end of each are the candidate's.
        label: index of the right one; -1 where it is not known.
        truncated: tokens were cut to fit.
        kind: classification, choice or generation.
        right: all that count as right, where these are more than the label.
        words: the candidates as the user wrote them; of generation ().
        answers: reference answers of a generation row.
        context: ids of what generation continues; of a masked prompt the sentence with its mask.
        max_new_tokens: of generation, at most.
        mask: position of the mask of a masked prompt, else None.
        num_merged: candidates whose first characters share a token with the context's last.
        id: the row's.
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

    @property
    def width(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.full), default=len(self.context))

    @property
    def num_tokens(self) -> int:
        """Tokens that a forward without gradients takes."""
        if _is_one(self):
            return self.width
        return self.prefix + (self.width - self.prefix) * len(self.full)

    @cached_property
    def shares_prefix(self) -> bool:
        """One sequence gives all scores: labels of one token after the same prefix, or a mask."""
        if self.mask is not None:
            return True
        prefix = self.full[0][:-1]
        return set(self.num_option) == {1} and all(ids[:-1] == prefix for ids in self.full)

    @cached_property
    def prefix(self) -> int:
        """Leading tokens that all candidates share, less the one before the first option token.

        The logits of that one are read, so it belongs to what runs once a candidate.
        """
        if not self.full:
            return 0
        before = min(len(ids) - n for ids, n in zip(self.full, self.num_option, strict=True)) - 1
        return min(before, _num_common(self.full))

    @property
    def gold(self) -> int:
        """Index of the candidate that is trained on; -1 where it is not known."""
        if self.kind == "generation":
            return 0 if self.full else -1
        return self.label

    @property
    def correct(self) -> frozenset[int]:
        """Indices that count as right; where the label is not known, and of generation, none."""
        has_label = self.kind != "generation" and self.label >= 0
        return self.right | {self.label} if has_label else self.right

    @property
    def is_labelled(self) -> bool:
        """There is something to compare a prediction with."""
        return bool(self.answers if self.kind == "generation" else self.correct)

    def gold_alone(self) -> "Candidates":
        """The row with no candidate but the gold one."""
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
    """Token ids of every candidate; too long ones lose tokens on the left, but keep the BOS.

    Args:
        rows: a label of -1 and no answers are fine: such rows can be scored, not trained on.
        prompt: with a mask only for classification.
        tokenizer: of the model.
        max_length: tokens of the context window.
        kind: classification, choice or generation.
        max_new_tokens: of generation: room that a prompt leaves in the window, as in MeZO.

    Raises:
        UserError: a candidate adds no token or leaves no room for one before it; a masked prompt
            that does not fit the tokenizer or the kind.
    """
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
    context_ids = _ids(tokenizer, contexts)
    text_ids = iter(_ids(tokenizer, list(itertools.chain(*texts))))

    def fitted(ids: list[int]) -> tuple[int, ...]:
        if len(ids) <= limit:
            return tuple(ids)
        keeps_bos = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
        return tuple([ids[0], *ids[1 - limit :]] if keeps_bos else ids[-limit:])

    encoded = []
    for i, row in enumerate(rows):
        context = context_ids[i]
        full, num_option, num_merged = [], [], 0
        longest = len(context) if kind == "generation" else 0
        for text in texts[i]:
            ids = next(text_ids)
            # As MeZO: what the candidate adds to the tokens of the context. A tokenizer may merge
            # across the border; then the candidate begins with the first token that differs.
            extra = len(ids) - len(context)
            if ids[: len(context)] != context:
                extra = len(ids) - _num_common([ids, context])
                num_merged += extra > 0
            if extra == len(ids):
                raise UserError(
                    f"row {row.id}: no token stands before {text!r}; choose a task.prompt that "
                    "shows more than what may be empty."
                )
            if not 0 < extra < limit:
                raise UserError(_unscorable(text[len(contexts[i]) :], extra, limit, kind, row.id))
            longest = max(longest, len(ids))
            full.append(fitted(ids))
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
                context=fitted(context) if kind == "generation" else (),
                max_new_tokens=max_new_tokens if kind == "generation" else 0,
                num_merged=num_merged,
                id=row.id,
            )
        )
    return encoded


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
    """For masked models: one sequence a row, each label word one token in place of the mask."""
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
    for row, ids in zip(rows, _ids(tokenizer, texts), strict=True):
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


def _is_one(row: Candidates) -> bool:
    """One sequence gives all that is asked of the row."""
    return not row.full or row.shares_prefix


def _num_common(sequences: Sequence[Any]) -> int:
    """Leading tokens in which all sequences agree."""
    # The first and the last in order differ as early as any two.
    first, last = min(sequences), max(sequences)
    pairs = enumerate(zip(first, last, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenization.encoded(tokenizer, texts)


class _HeldLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # untyped in transformers
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
class _Held:
    """Tokens with which rows begin, and what the model has made of them."""

    ids: tuple[int, ...]
    layers: Sequence[_HeldLayer]

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


class Scorer:
    """Scores rows with a model; the losses of training and evaluation are both its.

    Args:
        model: a language model of transformers.
        tokenizer: its own.
        compute_dtype: of matrix products, whatever the weights are stored in; None: as they are.
        places_before: positions that the model itself puts before every text: an adapter's.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        compute_dtype: torch.dtype | None = None,
        places_before: int = 0,
    ) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        self.tokenizer = tokenizer
        self.pad_id: int = tokenizer.pad_token_id
        # Whether the model calls its output layer: asked of a forward that was computed, for one
        # that is given from before (executor=lockstep) calls nothing.
        self._calls_head = False
        self.places_before = places_before
        self.holds_common = False  # rows begin with the same demonstrations: see holding()
        self._held: _Held | None = None
        #: weight (classes, hidden) and bias (classes,), float64: they score in place of label words
        self.probe: Mapping[str, Tensor] | None = None
        self.num_forwards = 0  # passes over a batch; a prefix that runs first is part of one

    def loss(self, batch: Sequence[Candidates]) -> Tensor:
        """The training objective of the batch: float32 ().

        Of classification the cross-entropy over the candidates' scores, mean of the rows; else the
        mean of -log p over all tokens of the gold candidates.

        Raises:
            UserError: the prompt is not for this model.
            ValueError: a row has no label.
        """
        return self._loss_sum(batch) / loss_weight(batch, "loss")

    def _loss_sum(self, batch: Sequence[Candidates]) -> Tensor:
        self._check_family(batch[0])
        if any(c.gold < 0 for c in batch):
            raise ValueError("a row without a label has no loss")
        self.num_forwards += 1
        lm = batch[0].kind != "classification"
        if lm:
            batch = [c.gold_alone() for c in batch]
        parts = _split_by_length(batch) if self._device.type == "cpu" else [batch]
        total = torch.zeros((), device=self._device)
        for part in parts:
            if lm:
                with self._computing():
                    total = total - self._log_p(part).sum()
            else:
                labels = self._tensor([c.label for c in part])
                total = total + F.cross_entropy(self.scores(part), labels, reduction="sum")
        return total

    def objective(self, batch: Sequence[Candidates], name: str = "loss") -> Tensor:
        """What a step is to lower: the loss of the batch, or 1 less its accuracy or F1.

        Those have no gradient that is of use, and need none: MeZO, arXiv 2305.17333, section 3.3.

        Args:
            batch: rows of one kind.
            name: "loss"; or "accuracy" of classification and choice, "f1" of generation, whose
                answers are generated for it.

        Returns:
            () float32 of the loss; else float64 in [0, 1] on the CPU.

        Raises:
            UserError: the prompt is not for this model.
            ValueError: a row has no label.
        """
        return self.loss(batch) if name == "loss" else 1 - self._outcomes(batch, name).mean()

    def objective_sum(self, batch: Sequence[Candidates], name: str = "loss") -> Tensor:
        """Part of an objective: over parts of a batch they add up to it, times its weight.

        The weight is :func:`loss_weight` of the whole batch; arguments, value and errors are else
        those of :meth:`objective`.
        """
        return self._loss_sum(batch) if name == "loss" else (1 - self._outcomes(batch, name)).sum()

    def _outcomes(self, batch: Sequence[Candidates], name: str) -> Tensor:
        if not all(c.is_labelled for c in batch):
            raise ValueError(f"a row without a label has no {name}")
        self.num_forwards += 1
        if name == "f1":
            found = [pair for of in self.generate_all(batch) for pair in zip(*of, strict=True)]
            return outcomes(batch, None, [text for _, text in sorted(found)])
        parts = _split_by_length(batch) if self._device.type == "cpu" else [batch]
        return torch.cat([outcomes(part, self.scores(part)) for part in parts])

    @contextmanager
    def holding(self, rows: Sequence[Candidates]) -> Iterator[None]:
        """Inside, the tokens with which all rows begin are computed once, not once a row.

        Only where ``holds_common`` asks for it and the model's attention makes it exact (to
        rounding); rows that were cut on the left begin with others, and are computed whole.
        """
        ids = self._begin(rows) if self.holds_common else ()
        longest = max(row.width + row.max_new_tokens for row in rows)
        cache = self._cache_for(longest) if ids else None
        if cache is None:
            yield
            return
        self._keep_keys(ids, cache)
        try:
            yield
        finally:
            self._held = None

    @staticmethod
    def _begin(rows: Sequence[Candidates]) -> tuple[int, ...]:
        """Tokens with which all rows begin, less one of the shortest: its logits are read."""
        whole = [c.full[0] if c.full else c.context for c in rows if not c.truncated]
        if not whole or rows[0].mask is not None:
            return ()
        most = min(c.prefix if c.full else len(c.context) - 1 for c in rows if not c.truncated)
        return whole[0][: max(0, min(most, _num_common(whole)))]

    @torch.no_grad()
    def _keep_keys(self, ids: tuple[int, ...], cache: DynamicCache) -> None:
        """One forward over the ids; what it leaves in the cache is held."""
        with self._computing():
            self._logits_at(
                [(0, 0)],
                (self.pad_id,),
                input_ids=self._padded([ids]),
                past_key_values=cache,
                use_cache=True,
            )
        filled: list[Any] = cache.layers
        self._held = _Held(ids, [_HeldLayer(layer.keys, layer.values) for layer in filled])

    def _held_for(self, batch: Sequence[Candidates]) -> _Held | None:
        """What all rows of the batch stand behind, where using it takes fewer tokens."""
        if self._held is None or torch.is_grad_enabled():
            return None
        return self._held if all(self._tokens(c) < c.num_tokens for c in batch) else None

    def _tokens(self, row: Candidates) -> int:
        """Tokens that a forward takes for the row, with what is held where that is fewer."""
        if self._held is None:
            return row.num_tokens
        size = len(self._held.ids)
        sequences = (*row.full, row.context) if row.context else row.full
        if any(ids[:size] != self._held.ids for ids in sequences):
            return row.num_tokens
        each = row.width - size
        return min(row.num_tokens, each if _is_one(row) else each * len(row.full))

    def _behind(self, sequences: Sequence[Sequence[int]], held: _Held | None) -> dict[str, Any]:
        """Inputs of a forward over sequences, which begin with what is held, if anything is."""
        if held is None:
            return {"input_ids": self._padded(sequences), "use_cache": False}
        size = len(held.ids)
        rests = [ids[size:] for ids in sequences]
        longest = max(map(len, rests))
        # Behind the end of its sequence no position beyond the model's last may be named.
        places = [[size + min(j, len(rest) - 1) for j in range(longest)] for rest in rests]
        return {
            "input_ids": self._padded(rests),
            "attention_mask": self._padded([[1] * len(ids) for ids in sequences], 0),
            "position_ids": self._tensor(places),
            "past_key_values": held.cache(),
            "use_cache": True,
        }

    def scores(self, batch: Sequence[Candidates]) -> Tensor:
        """(batch, most candidates of a row) float32, -inf where a row has fewer.

        Mean log-probability of the candidate's tokens; of classification up to a constant of the
        row.
        """
        self._check_family(batch[0])
        with self._computing():
            return self._scores(batch)

    def features(self, batch: Sequence[Candidates]) -> Tensor:
        """(batch, hidden) hidden states, as they enter the output layer.

        Of a row that of the last token of its prompt, or of its mask.
        """
        self._check_family(batch[0])
        with self._computing():
            return self._features(batch)

    def _features(self, batch: Sequence[Candidates]) -> Tensor:
        masked = batch[0].mask is not None
        prompts = [c.context if masked else c.full[0][: -c.num_option[0]] for c in batch]
        at = [len(p) - 1 if c.mask is None else c.mask for p, c in zip(prompts, batch, strict=True)]
        places = list(enumerate(at))
        seen: list[Tensor] = []
        head = self.model.get_output_embeddings()  # type: ignore[operator]  # transformers' own
        if head is None:
            raise UserError(
                f"method.l2: a probe reads what enters the output layer, and "
                f"{type(self.model).__name__} has none that gives its logits alone: choose another "
                "method, such as method=zero_shot."
            )
        handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            self._logits_at(
                places,
                (self.pad_id,),
                input_ids=self._padded(prompts),
                attention_mask=self._padded([[1] * len(ids) for ids in prompts], 0),
            )
        finally:
            handle.remove()
        sequences, positions = self._tensor(list(zip(*places, strict=True)))
        hidden = seen[0]
        return hidden[sequences.to(hidden.device), positions.to(hidden.device)].to(self._device)

    def _scores(self, batch: Sequence[Candidates]) -> Tensor:
        if self.probe is not None:
            weight, bias = (self.probe[name].to(self._device) for name in ("weight", "bias"))
            logits = self._features(batch).double() @ weight.T + bias
            return logits.log_softmax(1).float()
        if batch[0].kind == "classification":
            if batch[0].mask is not None:
                return self._mask_scores(batch)
            labels = {tuple(ids[-1] for ids in c.full) for c in batch}
            if len(labels) == 1 and all(c.shares_prefix for c in batch):
                return self._next_token_scores(batch, labels.pop())
        counts = [n for c in batch for n in c.num_option]
        if not counts:
            return torch.full((len(batch), 1), -math.inf, device=self._device)
        means = self._log_p(batch) / self._tensor(counts)
        rows = torch.split(means, [len(c.full) for c in batch])
        return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-math.inf)

    @torch.no_grad()
    def generate(self, batch: Sequence[Candidates]) -> list[str]:
        """Greedy continuations of the contexts; see :func:`smezo_cli.generation.greedy`."""
        self._check_family(batch[0])
        longest = max(c.max_new_tokens for c in batch)
        contexts = [c.context for c in batch]
        held = self._held_for(batch)
        size = 0 if held is None else len(held.ids)
        with self._computing():
            return generation.greedy(
                self.model,
                self.tokenizer,
                [ids[size:] for ids in contexts],
                longest,
                past=None if held is None else held.growing(len(contexts)),
                num_past=size,
            )

    def _check_family(self, row: Candidates) -> None:
        """Refuse a prompt that the model would take in and answer with nonsense."""
        name = type(self.model).__name__
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

    def _computing(self) -> AbstractContextManager[Any]:
        if self.compute_dtype is None:
            return nullcontext()
        # Its cache of cast weights would outlive a probe's scratch.
        return torch.autocast(self._device.type, self.compute_dtype, cache_enabled=False)

    def _next_token_scores(self, batch: Sequence[Candidates], label_ids: Sequence[int]) -> Tensor:
        prefixes = [c.full[0][:-1] for c in batch]
        held = self._held_for(batch)
        start = 0 if held is None else len(held.ids)
        last = [len(ids) - 1 - start for ids in prefixes]
        read = sorted(set(last))
        # On the CPU, from where it may index the states of a last layer on any device.
        kept, column = torch.tensor(read), self._tensor([read.index(p) for p in last])
        rows = self._tensor(label_ids)
        # Right-padded: a causal model's earlier positions do not see it, so no mask is needed.
        inputs = self._behind(prefixes, held) | {"logits_to_keep": kept}
        with self._vocabulary(rows) as narrowed:
            logits = self.model(**inputs).logits  # (batch, kept, labels)
        if not narrowed:
            logits = logits[..., rows]
        found: Tensor = logits[torch.arange(len(batch), device=logits.device), column].float()
        return found

    def _mask_scores(self, batch: Sequence[Candidates]) -> Tensor:
        (label_ids,) = {tuple(ids[c.mask] for ids in c.full) for c in batch if c.mask is not None}
        contexts = [c.context for c in batch]
        places = [(i, c.mask) for i, c in enumerate(batch) if c.mask is not None]
        return self._logits_at(
            places,
            label_ids,
            input_ids=self._padded(contexts),
            # Such a model looks both ways: padding must be hidden from it.
            attention_mask=self._padded([[1] * len(ids) for ids in contexts], 0),
        ).float()

    def _log_p(self, batch: Sequence[Candidates]) -> Tensor:
        """Sum of the log-probabilities of each candidate's tokens, row after row: float32."""
        options = [n for c in batch for n in c.num_option]
        held = self._held_for(batch)
        alone = held is not None or torch.is_grad_enabled()
        cache = None if alone else self._cache_that_saves(batch)
        logits = self._apart(batch, held) if cache is None else self._behind_prefix(batch, cache)
        targets = [
            token
            for c in batch
            for ids, n in zip(c.full, c.num_option, strict=True)
            for token in ids[-n:]
        ]
        log_p = -F.cross_entropy(logits.float(), self._tensor(targets), reduction="none")
        return torch.stack([of_one.sum() for of_one in torch.split(log_p, options)])

    def _apart(self, batch: Sequence[Candidates], held: _Held | None) -> Tensor:
        """Logits before each option token, (option tokens, vocabulary); a sequence a candidate."""
        # Logits at position p speak of token p + 1: the last token is never read.
        sequences = [ids[:-1] for c in batch for ids in c.full]
        options = [n for c in batch for n in c.num_option]
        start = 0 if held is None else len(held.ids)
        places = [
            (i, p - start)
            for i, (ids, n) in enumerate(zip(sequences, options, strict=True))
            for p in range(len(ids) - n, len(ids))
        ]
        return self._logits_at(places, None, **self._behind(sequences, held))

    def _behind_prefix(self, batch: Sequence[Candidates], cache: DynamicCache) -> Tensor:
        """The same logits; what a row's candidates have in common runs once."""
        prefixes = [c.full[0][: c.prefix] for c in batch]
        # Only the keys and values are wanted: one logit at one place is as few as there can be.
        self._logits_at(
            [(0, 0)],
            (self.pad_id,),
            input_ids=self._padded(prefixes),
            past_key_values=cache,
            use_cache=True,
        )
        owner = [i for i, c in enumerate(batch) for _ in c.full]
        rows = self._tensor(owner)
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
        return self._logits_at(
            places,
            None,
            input_ids=self._padded(rests),
            attention_mask=self._padded(seen, 0),
            position_ids=self._tensor(positions),
            past_key_values=cache,
            use_cache=True,
        )

    def _cache_that_saves(self, batch: Sequence[Candidates]) -> DynamicCache | None:
        """An empty cache if running common prefixes first saves tokens and is exact, else None."""
        lengths = [(len(ids) - 1, c.prefix) for c in batch for ids in c.full]
        longest_prefix = max(prefix for _, prefix in lengths)
        longest_rest = max(length - prefix for length, prefix in lengths)
        together = len(batch) * longest_prefix + len(lengths) * longest_rest
        apart = len(lengths) * max(length for length, _ in lengths)
        if min(p for _, p in lengths) < 1 or together + SECOND_PASS_TOKENS >= apart:
            return None
        return self._cache_for(longest_prefix + longest_rest)

    def _cache_for(self, tokens: int) -> DynamicCache | None:
        """An empty cache if sequences of so many tokens may be computed in two parts, else None."""
        model = self.model
        if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
            return None
        if (
            not {"past_key_values", "position_ids"}
            <= inspect.signature(type(model).forward).parameters.keys()
        ):
            return None
        cache = DynamicCache(config=model.config)
        width = tokens + self.places_before
        # Recurrent states cannot hide a prefix's padding; a window counts it as tokens.
        exact = [
            type(layer) is DynamicLayer
            or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > width)
            for layer in cache.layers
        ]
        return cache if exact and all(exact) else None

    def _logits_at(
        self, places: Sequence[tuple[int, int]], vocabulary: Sequence[int] | None, **inputs: Any
    ) -> Tensor:
        """(places, vocabulary) logits; the output layer computes nothing else.

        Args:
            places: (sequence, position) of each.
            vocabulary: the output rows wanted; None: all.
            inputs: of the model's forward.
        """
        sequences, positions = self._tensor(list(zip(*places, strict=True)))
        head = self.model.get_output_embeddings()  # type: ignore[operator]  # transformers' own

        def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            self._calls_head = True
            hidden, *others = args  # (sequences, positions, hidden)
            at = sequences.to(hidden.device), positions.to(hidden.device)
            return (hidden[at][None], *others)

        handle = head.register_forward_pre_hook(pick) if isinstance(head, nn.Module) else None
        rows = None if vocabulary is None else self._tensor(vocabulary)
        try:
            with self._vocabulary(rows) as narrowed:
                logits: Tensor = self.model(**inputs).logits
        finally:
            if handle is not None:
                handle.remove()
        logits = logits[0] if self._calls_head else logits[sequences, positions]
        return logits if narrowed else logits[:, rows]

    @contextmanager
    def _vocabulary(self, rows: Tensor | None) -> Iterator[bool]:
        """Inside, the output layer computes only these rows, where True is yielded."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]  # transformers' own
        if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
            with only_rows(head, rows) if rows is not None else nullcontext():
                yield True
        else:  # a head that is wrapped or of another make
            yield rows is None

    def _padded(self, sequences: Sequence[Sequence[int]], padding: int | None = None) -> Tensor:
        """(sequences, longest), padded on the right."""
        width = max(map(len, sequences))
        padding = self.pad_id if padding is None else padding
        return self._tensor([[*s, *[padding] * (width - len(s))] for s in sequences])

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def score_all(
        self, rows: Sequence[Candidates], first: int = 0, every: int = 1
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Score many rows in batches of like length, without gradients.

        Args:
            rows: of one kind.
            first: number of the first batch that is scored here.
            every: of how many batches one is.

        Yields:
            Indices of the batch's rows and their scores, float32 (batch, candidates) on the CPU.
        """
        for chosen in self._batches(rows, first, every):
            with torch.inference_mode():
                scores = self.scores([rows[i] for i in chosen]).cpu()
            yield chosen, scores

    def features_of(self, rows: Sequence[Candidates]) -> Tensor:
        """The :meth:`features` of many rows, in batches of like length: float64 on the CPU."""
        parts, order = [], list[int]()
        for chosen in self._batches(rows):
            with torch.inference_mode():
                parts.append(self.features([rows[i] for i in chosen]).double().cpu())
            order += chosen
        features = torch.cat(parts)
        return torch.empty_like(features).index_copy_(0, torch.tensor(order), features)

    def _batches(
        self, rows: Sequence[Candidates], first: int = 0, every: int = 1
    ) -> Iterator[list[int]]:
        """Indices of rows of like length; each is a forward."""
        limit = EVAL_TOKENS if self._device.type == "cpu" else EVAL_TOKENS_GPU
        tokens = [self._tokens(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -tokens[i])
        start = number = 0
        while start < len(order):
            size = max(1, limit // tokens[order[start]])
            chosen = order[start : start + size]
            start += size
            if number % every == first:
                self.num_forwards += 1
                yield chosen
            number += 1

    def generate_all(
        self, rows: Sequence[Candidates], first: int = 0, every: int = 1
    ) -> Iterator[tuple[list[int], list[str]]]:
        """Continue many rows in batches of like length; `first` and `every` as in `score_all`.

        Yields:
            Indices of the batch's rows and their texts.
        """
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].context))
        for start in range(first * EVAL_ANSWERS, len(order), every * EVAL_ANSWERS):
            chosen = order[start : start + EVAL_ANSWERS]
            yield chosen, self.generate([rows[i] for i in chosen])


def loss_weight(batch: Sequence[Candidates], name: str) -> int:
    """What sums of an objective are divided by: rows, or tokens where a loss is a token's."""
    if name != "loss" or batch[0].kind == "classification":
        return len(batch)
    return sum(c.num_option[c.gold] for c in batch)


def outcomes(
    rows: Sequence[Candidates], scores: Tensor | None, texts: Sequence[str] = ()
) -> Tensor:
    """The metric of each row, float64 (n,); nan where nothing is known to compare with.

    Args:
        rows: of one kind.
        scores: (n, most candidates of a row), read of classification and choice.
        texts: of generation the answers.
    """
    if rows[0].kind == "generation":
        return of_answers(rows, texts, metrics.f1)
    assert scores is not None
    right = torch.zeros(scores.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        right[i, list(row.correct)] = True
    found = metrics.correct(scores.cpu(), right).double()
    return torch.where(torch.tensor([row.is_labelled for row in rows]), found, math.nan)


def of_answers(
    rows: Sequence[Candidates],
    texts: Sequence[str],
    metric: Callable[[str, Sequence[str]], float],
) -> Tensor:
    """A metric of each row's answer, float64 (n,); nan where no reference is known."""
    found = [
        metric(text, row.answers) if row.answers else math.nan
        for text, row in zip(texts, rows, strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)


def _split_by_length(batch: Sequence[Candidates]) -> list[Sequence[Candidates]]:
    """One or two parts of like length, where that saves a sixth of the padded tokens.

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

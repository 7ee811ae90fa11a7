"""Candidates scored by a language model (MeZO, arXiv 2305.17333, appendix E), and the losses.

A row's candidates are its context followed by each label word (classification), by each of its
own options (choice) or by its answer (generation); a candidate's score is the mean log-probability
of its tokens behind the context. Classification trains on the cross-entropy over the scores,
choice and generation on the mean of -log p over the gold candidates' tokens.

Of a calibrated prompt (SFC) a candidate's score is the sum of the log-probabilities of its tokens
less that sum behind the prompt's base, which shows nothing of the row itself.

Nothing is computed that a loss does not read. Where every label is one token after the same
prefix, one forward per row gives all scores, and only the label rows of the output layer are
computed: the softmax over candidates cancels what the others would have added. Longer candidates
run their common prefix once where no gradient is asked for. The output layer sees only the
positions whose logits are read.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from smezo_cli.errors import UserError
from smezo_cli.scoring import generation
from smezo_cli.scoring.batching import Batching
from smezo_cli.scoring.candidates import (
    Candidates,
    _label_ids,
    is_one,
    num_common,
    split_by_length,
)
from smezo_cli.scoring.objectives import NonFiniteScore, loss_weight, outcomes
from smezo_cli.scoring.prefix_cache import Held, HeldLayer
from smezo_cli.scoring.tokens import num_rows, padding_id
from smezo_cli.zo.probe import only_rows

EVAL_TOKENS = 512  # padded tokens in an evaluation batch: activations stay in a CPU's cache
EVAL_TOKENS_GPU = 4096  # a GPU would rather have few launches; bounds the logits kept at once
EVAL_ANSWERS = 16  # rows generated together: each token reads all weights once for all of them
# A second pass reads all weights (and, under a probe, draws all noise) once more; on a CPU and a
# model of 135M weights that takes the time of 40 (and 200) tokens; this lies between.
SECOND_PASS_TOKENS = 128


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
        self.pad_id = padding_id(tokenizer, model)
        # Whether the model calls its output layer: asked of a forward that was computed, for one
        # that is given from before (executor=lockstep) calls nothing.
        self._calls_head = False
        self.places_before = places_before
        self.holds_common = False  # rows begin with the same demonstrations: see holding()
        self._held: Held | None = None
        #: which sequences share a forward, of scores (and losses) and of generated answers
        self.batching = self.batching_of_answers = Batching()
        self.always_caches = False  # where a common prefix saves too little to be worth it, too
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
        parts = split_by_length(batch) if self._device.type == "cpu" else [batch]
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
            () float32 of the loss; else float64 in [0, 1] on the CPU, NaN where a score is not
            finite.

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
            texts = dict[int, str | None]()
            for chosen, of_chosen in self.generate_all(batch):
                texts |= zip(chosen, of_chosen, strict=True)
            return outcomes(batch, None, [texts[i] for i in range(len(batch))])
        parts = split_by_length(batch) if self._device.type == "cpu" else [batch]
        return torch.cat([outcomes(part, self.scores(part)) for part in parts])

    @contextmanager
    def holding(self, rows: Sequence[Candidates]) -> Iterator[None]:
        """Inside, the tokens with which all rows begin are computed once, not once a row.

        Only where ``holds_common`` asks for it and the model's attention makes it exact (to
        rounding); rows that were cut on the left begin with others, and are computed whole.
        """
        may_hold = self.holds_common and self.batching.caches and self.batching_of_answers.caches
        ids = self._begin(rows) if may_hold else ()
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
        return whole[0][: max(0, min(most, num_common(whole)))]

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
        self._held = Held(ids, [HeldLayer(layer.keys, layer.values) for layer in filled])

    def _held_for(self, batch: Sequence[Candidates]) -> Held | None:
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
        return min(row.num_tokens, each if is_one(row) else each * len(row.full))

    def _behind(self, sequences: Sequence[Sequence[int]], held: Held | None) -> dict[str, Any]:
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

        Mean log-probability of the candidate's tokens; of a calibrated prompt their sum less that
        behind its base. Of classification up to a constant of the row.
        """
        self._check_family(batch[0])
        with self._computing():
            if batch[0].base is not None and self.probe is None:
                return self._calibrated(batch)
            return self._scores(batch)

    def _calibrated(self, batch: Sequence[Candidates]) -> Tensor:
        """Scores as sums over a candidate's tokens, less those under the base of the row."""
        numbers: dict[Candidates, int] = {}
        at = [numbers.setdefault(c.base, len(numbers)) for c in batch if c.base is not None]
        bases = list(numbers)
        together = [*batch, *bases]
        if self._held is None and _label_ids(together) is not None:
            scores = self._scores(together)
            own, of_bases = scores[: len(batch)], scores[len(batch) :]
        else:
            own, of_bases = (self._scores(rows, sums=True) for rows in (batch, bases))
        less = of_bases[self._tensor(at)]
        counts = self._tensor([len(c.full) for c in batch])
        fewer = torch.arange(own.shape[1], device=own.device) >= counts[:, None]
        return own - less.masked_fill(fewer, 0)

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

        def together(chosen: list[int]) -> Tensor:
            return self._features_of([prompts[i] for i in chosen], [batch[i] for i in chosen])

        return self._in_forwards(prompts, together)

    def _features_of(self, prompts: Sequence[Sequence[int]], batch: Sequence[Candidates]) -> Tensor:
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

    def _scores(self, batch: Sequence[Candidates], sums: bool = False) -> Tensor:
        if self.probe is not None:
            weight, bias = (self.probe[name].to(self._device) for name in ("weight", "bias"))
            logits = self._features(batch).double() @ weight.T + bias
            return logits.log_softmax(1).float()
        if batch[0].mask is not None:
            return self._in_forwards(
                [c.context for c in batch],
                lambda chosen: self._mask_scores([batch[i] for i in chosen]),
            )
        if (label_ids := _label_ids(batch)) is not None:
            return self._in_forwards(
                [c.full[0] for c in batch],
                lambda chosen: self._next_token_scores([batch[i] for i in chosen], label_ids),
            )
        counts = [n for c in batch for n in c.num_option]
        if not counts:
            return torch.full((len(batch), 1), -math.inf, device=self._device)
        log_p = self._log_p(batch)
        means = log_p if sums else log_p / self._tensor(counts)
        rows = torch.split(means, [len(c.full) for c in batch])
        return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-math.inf)

    def _in_forwards(
        self, sequences: Sequence[Sequence[int]], compute: Callable[[list[int]], Tensor]
    ) -> Tensor:
        """What ``compute`` gives for sequences (by number), forward by forward, in their order.

        One forward, unless :attr:`batching` keeps some of them apart.
        """
        groups = self.batching.groups(list(map(len, sequences)))
        if len(groups) == 1:
            return compute(groups[0])
        found = torch.cat([compute(chosen) for chosen in groups])
        order = torch.tensor([i for chosen in groups for i in chosen], device=found.device)
        return found[order.argsort()]

    @torch.no_grad()
    def generate(self, batch: Sequence[Candidates]) -> list[str | None]:
        """Greedy continuations of the contexts; see :func:`smezo_cli.scoring.generation.greedy`."""
        self._check_family(batch[0])
        longest = max(c.max_new_tokens for c in batch)
        contexts = [c.context for c in batch]
        held = self._held_for(batch)
        size = 0 if held is None else len(held.ids)
        texts: dict[int, str | None] = {}
        with self._computing():
            for chosen in self.batching_of_answers.groups(list(map(len, contexts))):
                answers = generation.greedy(
                    self.model,
                    self.tokenizer,
                    [contexts[i][size:] for i in chosen],
                    longest,
                    past=None if held is None else held.growing(len(chosen)),
                    num_past=size,
                    caches=self.batching_of_answers.caches,
                )
                texts |= zip(chosen, answers, strict=True)
        return [texts[i] for i in range(len(batch))]

    def continued(
        self,
        contexts: Sequence[Sequence[int]],
        batching: Batching,
        num: int,
        columns: Sequence[int],
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Continue contexts by the most probable token, so many times, whatever it is.

        Yields:
            Of the contexts that share a forward their numbers; logits (contexts, num, columns);
            and tokens (contexts, num).
        """
        for chosen in batching.groups(list(map(len, contexts))):
            with self._computing():
                steps = generation.next_tokens(
                    self.model,
                    self.pad_id,
                    [contexts[i] for i in chosen],
                    caches=batching.caches,
                )
                found = [(logits[:, columns].float(), best) for logits, best in islice(steps, num)]
            logits, tokens = (torch.stack(of, dim=1) for of in zip(*found, strict=True))
            yield chosen, logits, tokens

    def logits_alone(
        self, ids: Sequence[int], num: int, columns: Sequence[int], copies: int = 1
    ) -> Tensor:
        """(num, columns) logits at the last places of one sequence, by one forward over it.

        Args:
            ids: of the sequence.
            num: of places.
            columns: of the vocabulary.
            copies: of the sequence, side by side; what the first gives is returned.
        """
        places = [(0, p) for p in range(len(ids) - num, len(ids))]
        with self._computing():
            found = self._logits_at(places, columns, **self._behind([ids] * copies, None))
        return found.float()

    def some_of_vocabulary(self, most: int) -> list[int]:
        """At most so many numbers of tokens, evenly spread."""
        size = num_rows(self.model) or 1
        return list(range(0, size, -(-size // most)))

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
        sequences = [ids for c in batch for ids in c.full]
        options = [n for c in batch for n in c.num_option]
        held = self._held_for(batch)
        alone = held is not None or torch.is_grad_enabled()
        cache = None if alone else self._cache_that_saves(batch)

        def sums(logits: Tensor, chosen: Sequence[int]) -> Tensor:
            targets = [token for i in chosen for token in sequences[i][-options[i] :]]
            log_p = -F.cross_entropy(logits.float(), self._tensor(targets), reduction="none")
            each = torch.split(log_p, [options[i] for i in chosen])
            return torch.stack([of_one.sum() for of_one in each])

        if cache is not None:
            return sums(self._behind_prefix(batch, cache), range(len(sequences)))

        def together(chosen: list[int]) -> Tensor:
            of_chosen = [sequences[i] for i in chosen], [options[i] for i in chosen]
            return sums(self._apart(*of_chosen, held), chosen)

        return self._in_forwards(sequences, together)

    def _apart(
        self, candidates: Sequence[Sequence[int]], options: Sequence[int], held: Held | None
    ) -> Tensor:
        """Logits before each option token, (option tokens, vocabulary); a sequence a candidate."""
        # Logits at position p speak of token p + 1: the last token is never read.
        sequences = [ids[:-1] for ids in candidates]
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
        if not self.batching.caches or min(p for _, p in lengths) < 1:
            return None
        if together + SECOND_PASS_TOKENS >= apart and not self.always_caches:
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
        self,
        rows: Sequence[Candidates],
        first: int = 0,
        every: int = 1,
        done: Collection[int] = (),
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Score many rows in batches of like length, without gradients.

        Args:
            rows: of one kind.
            first: number of the first batch that is scored here.
            every: of how many batches one is.
            done: indices of rows that need not be scored; a batch of such alone is left out.

        Yields:
            Indices of the batch's rows and their scores, float32 (batch, candidates) on the CPU.
        """
        for chosen in self._batches(rows, first, every, done):
            with torch.inference_mode():
                scores = self.scores([rows[i] for i in chosen]).cpu()
            yield chosen, scores

    @property
    def most_tokens(self) -> int:
        """Padded tokens in a forward of an evaluation, unless one row has more."""
        return EVAL_TOKENS if self._device.type == "cpu" else EVAL_TOKENS_GPU

    def log_p_of_bases(
        self, rows: Sequence[Candidates], first: int = 0, every: int = 1
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Of calibrated rows the sum of log-probabilities of the gold candidate behind its base.

        What is trained on in a choice task is the score of the gold candidate with this added.

        Args:
            rows: of a calibrated prompt; those without a label are left out.
            first: number of the first batch that is scored here.
            every: of how many batches one is.

        Yields:
            Indices of a batch's rows and their sums, float32 (batch,) on the CPU.
        """
        known = [
            (i, dataclasses.replace(c.base, label=c.gold).gold_alone())
            for i, c in enumerate(rows)
            if c.base is not None and c.gold >= 0
        ]
        bases = [base for _, base in known]
        for chosen, means in self.score_all(bases, first, every):
            counts = torch.tensor([bases[k].num_option[0] for k in chosen])
            yield [known[k][0] for k in chosen], means[:, 0] * counts

    def features_all(
        self, rows: Sequence[Candidates], done: Collection[int] = ()
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Compute the :meth:`features` of many rows in batches of like length.

        Args:
            rows: of one kind.
            done: as in :meth:`score_all`.

        Yields:
            Indices of the batch's rows and their features, float64 on the CPU.

        Raises:
            NonFiniteScore: a hidden state is not finite; it names the row.
        """
        for chosen in self._batches(rows, done=done):
            with torch.inference_mode():
                features = self.features([rows[i] for i in chosen]).double().cpu()
            for i, is_finite in zip(chosen, features.isfinite().all(1).tolist(), strict=True):
                if not is_finite:
                    raise NonFiniteScore(f"the hidden state of row {rows[i].id} is not finite")
            yield chosen, features

    def _batches(
        self,
        rows: Sequence[Candidates],
        first: int = 0,
        every: int = 1,
        done: Collection[int] = (),
    ) -> Iterator[list[int]]:
        """Indices of rows of like length; each is a forward."""
        limit, finished = self.most_tokens, frozenset(done)
        tokens = [self._tokens(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -tokens[i])
        start = number = 0
        while start < len(order):
            size = max(1, limit // tokens[order[start]])
            chosen = order[start : start + size]
            start += size
            if finished.issuperset(chosen):
                continue
            if number % every == first:
                self.num_forwards += 1
                yield chosen
            number += 1

    def generate_all(
        self,
        rows: Sequence[Candidates],
        first: int = 0,
        every: int = 1,
        done: Collection[int] = (),
    ) -> Iterator[tuple[list[int], list[str | None]]]:
        """Continue many rows in batches of like length; all arguments as in `score_all`.

        Yields:
            Indices of the batch's rows and their texts.
        """
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].context))
        starts = range(0, len(order), EVAL_ANSWERS)
        finished = frozenset(done)
        batches = [order[start : start + EVAL_ANSWERS] for start in starts]
        left = [chosen for chosen in batches if not finished.issuperset(chosen)]
        for chosen in left[first::every]:
            yield chosen, self.generate([rows[i] for i in chosen])

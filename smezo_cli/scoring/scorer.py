"""Score candidates by a language model, and compute losses (MeZO, arXiv 2305.17333, appendix E).

A row's candidates are its context followed by each label word (classification), by each of its
own options (choice) or by its answer (generation); a candidate's score is the mean log-probability
of its tokens behind the context. Classification trains on the cross-entropy over the scores,
choice and generation on the mean of -log p over the gold candidates' tokens.

With a calibrated prompt (SFC) a candidate's score is the sum of the log-probabilities of its tokens
less that sum behind the prompt's base, which shows nothing of the row itself.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smezo_cli.scoring import candidate_scores, generation, prefix_cache
from smezo_cli.scoring.batching import Batching, batches_of_like_length
from smezo_cli.scoring.candidate_scores import Sharing, log_p
from smezo_cli.scoring.candidates import (
    Candidates,
    check_family,
    shared_label_ids,
    split_by_length,
)
from smezo_cli.scoring.forward import Forward
from smezo_cli.scoring.objectives import NonFiniteScore, loss_weight, outcomes
from smezo_cli.scoring.prefix_cache import Held
from smezo_cli.scoring.tokens import padding_id

EVAL_TOKENS = 512  # padded tokens in an evaluation batch: activations stay in a CPU's cache
EVAL_TOKENS_GPU = 4096  # a GPU would rather have few launches; bounds the logits kept at once
EVAL_ANSWERS = 16  # rows generated together: each token reads all weights once for all of them


R = TypeVar("R")
T = TypeVar("T")


class Halving(Protocol):
    """Compute batches in parts that fit; see :class:`smezo_cli.machine.out_of_memory.Halving`."""

    most: int | None

    def __call__(
        self, batch: Sequence[R], tokens: Callable[[R], int], compute: Callable[[Sequence[R]], T]
    ) -> list[T]:
        """Return what is computed of each part of a batch, in order."""


class _Whole:
    """Compute batches whole."""

    most: int | None = None

    def __call__(
        self, batch: Sequence[R], tokens: Callable[[R], int], compute: Callable[[Sequence[R]], T]
    ) -> list[T]:
        return [compute(batch)]


class Scorer:
    """Compute the scores, losses and answers of rows with a model, for training and evaluation.

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
        self.tokenizer = tokenizer
        self.compute_dtype = compute_dtype
        self.places_before = places_before
        self.forward = Forward(model, padding_id(tokenizer, model), compute_dtype, places_before)
        self.holds_common = False  # rows begin with the same demonstrations: see holding()
        self._held: Held | None = None
        #: which sequences share a forward, of scores (and losses) and of generated answers
        self.batching = self.batching_of_answers = Batching()
        self.always_caches = False  # where a common prefix saves too little to be worth it, too
        #: how a batch of an evaluation is computed that the memory may be too small for; batches
        #: stay what they are, as ranks share them, and a stopped evaluation goes on
        self.halving: dict[str, Halving] = {"scores": _Whole(), "answers": _Whole()}
        #: weight (classes, hidden) and bias (classes,), float64: they score in place of label words
        self.probe: Mapping[str, Tensor] | None = None
        self.num_forwards = 0  # passes over a batch; a prefix that runs first is part of one

    def loss(self, batch: Sequence[Candidates]) -> Tensor:
        """Return the training objective of the batch: float32 ().

        In classification the cross-entropy over the candidates' scores, as a mean over the rows;
        else the mean of -log p over all tokens of the gold candidates.

        Raises:
            UserError: the prompt is not for this model.
            ValueError: a row has no label.
        """
        return self._loss_sum(batch) / loss_weight(batch, "loss")

    def _loss_sum(self, batch: Sequence[Candidates]) -> Tensor:
        check_family(batch[0], self.model)
        if any(c.gold < 0 for c in batch):
            raise ValueError("a row without a label has no loss")
        self.num_forwards += 1
        lm = batch[0].kind != "classification"
        if lm:
            batch = [c.gold_alone() for c in batch]
        total = torch.zeros((), device=self.forward.device)
        for part in self.parts(batch):
            if lm:
                with self.forward.computing():
                    total = total - log_p(self.forward, part, self._sharing).sum()
            else:
                labels = self.forward.tensor([c.label for c in part])
                total = total + F.cross_entropy(self.scores(part), labels, reduction="sum")
        return total

    def objective(self, batch: Sequence[Candidates], name: str = "loss") -> Tensor:
        """Return what a step is to lower: the loss of the batch, or 1 less its accuracy or F1.

        Accuracy and F1 have no useful gradient, and need none: MeZO, arXiv 2305.17333, section 3.3.

        Args:
            batch: rows of one kind.
            name: "loss"; or "accuracy" for classification and choice; "f1" for generation,
                whose answers are generated for it.

        Returns:
            () float32 for the loss; else float64 in [0, 1] on the CPU, NaN where a score is not
            finite.

        Raises:
            UserError: the prompt is not for this model.
            ValueError: a row has no label.
        """
        return self.loss(batch) if name == "loss" else 1 - self._outcomes(batch, name).mean()

    def objective_sum(self, batch: Sequence[Candidates], name: str = "loss") -> Tensor:
        """Return an objective times its weight, which adds up over the parts of a batch.

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
            for chosen in self._batches_of_answers(batch):  # a step halves its rows by itself
                texts |= zip(chosen, self.generate([batch[i] for i in chosen]), strict=True)
            return outcomes(batch, None, [texts[i] for i in range(len(batch))])
        return torch.cat([outcomes(part, self.scores(part)) for part in self.parts(batch)])

    def parts(self, batch: Sequence[Candidates]) -> Sequence[Sequence[Candidates]]:
        """Return the parts of a batch that share forwards: on a CPU rows of like length."""
        return split_by_length(batch) if self.forward.device.type == "cpu" else [batch]

    @contextmanager
    def holding(self, rows: Sequence[Candidates]) -> Iterator[None]:
        """Compute the tokens with which all rows begin only once within the context.

        Only where ``holds_common`` asks for it and the model's attention makes it exact (to
        rounding); rows that were cut on the left begin with others, and are computed whole.
        """
        may_hold = self.holds_common and self.batching.caches and self.batching_of_answers.caches
        ids = prefix_cache.common_begin(rows) if may_hold else ()
        longest = max(row.width + row.max_new_tokens for row in rows)
        cache = prefix_cache.cache_for(self.forward, longest) if ids else None
        if cache is None:
            yield
            return
        self._held = prefix_cache.hold(self.forward, ids, cache)
        try:
            yield
        finally:
            self._held = None

    def scores(self, batch: Sequence[Candidates]) -> Tensor:
        """Return scores (batch, most candidates of a row) in float32, -inf where a row has fewer.

        A score is the mean log-probability of the candidate's tokens; with a calibrated prompt
        their sum less that behind its base. In classification it is known up to a constant of the
        row.
        """
        check_family(batch[0], self.model)
        with self.forward.computing():
            if batch[0].base is not None and self.probe is None:
                return self._calibrated(batch)
            return self._scores(batch)

    def _calibrated(self, batch: Sequence[Candidates]) -> Tensor:
        """Return scores as sums over a candidate's tokens, less those under the base of the row."""
        numbers: dict[Candidates, int] = {}
        at = [numbers.setdefault(c.base, len(numbers)) for c in batch if c.base is not None]
        bases = list(numbers)
        together = [*batch, *bases]
        if self._held is None and shared_label_ids(together) is not None:
            scores = self._scores(together)
            own, of_bases = scores[: len(batch)], scores[len(batch) :]
        else:
            own, of_bases = (self._scores(rows, sums=True) for rows in (batch, bases))
        less = of_bases[self.forward.tensor(at)]
        counts = self.forward.tensor([len(c.full) for c in batch])
        fewer = torch.arange(own.shape[1], device=own.device) >= counts[:, None]
        return own - less.masked_fill(fewer, 0)

    def features(self, batch: Sequence[Candidates]) -> Tensor:
        """Return hidden states (batch, hidden) as they enter the output layer.

        Those of the last token of each prompt, or of its mask.
        """
        check_family(batch[0], self.model)
        with self.forward.computing():
            return candidate_scores.hidden_states(self.forward, batch, self.batching)

    def _scores(self, batch: Sequence[Candidates], sums: bool = False) -> Tensor:
        if self.probe is not None:
            weight, bias = (self.probe[name].to(self.forward.device) for name in ("weight", "bias"))
            hidden = candidate_scores.hidden_states(self.forward, batch, self.batching)
            logits = hidden.double() @ weight.T + bias
            return logits.log_softmax(1).float()
        return candidate_scores.scores(self.forward, batch, self._sharing, sums=sums)

    @property
    def _sharing(self) -> Sharing:
        return Sharing(self.batching, self._held, self.always_caches)

    @torch.no_grad()
    def generate(self, batch: Sequence[Candidates]) -> list[str | None]:
        """Continue the contexts greedily; see :func:`smezo_cli.scoring.generation.greedy`."""
        check_family(batch[0], self.model)
        return generation.answers(
            self.forward,
            self.tokenizer,
            [c.context for c in batch],
            max(c.max_new_tokens for c in batch),
            self.batching_of_answers,
            prefix_cache.serving(self._held, batch),
        )

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

        Raises:
            UserError: the memory is too small for a row, where :attr:`halving` halves batches.
        """
        for chosen in self._batches(rows, first, every, done):
            batch = [rows[i] for i in chosen]
            parts = self.halving["scores"](batch, self._num_tokens, self._scores_on_cpu)
            width = max(part.shape[1] for part in parts)
            padded = [F.pad(part, (0, width - part.shape[1]), value=-math.inf) for part in parts]
            yield chosen, torch.cat(padded)

    @torch.inference_mode()
    def _scores_on_cpu(self, batch: Sequence[Candidates]) -> Tensor:
        return self.scores(batch).cpu()

    def _num_tokens(self, row: Candidates) -> int:
        return prefix_cache.num_tokens(row, self._held)

    @property
    def most_at_once(self) -> dict[str, int]:
        """Return tokens that fit into the memory, of "scores" and of "answers".

        Nothing is there before a batch has been too large.
        """
        return {name: of.most for name, of in self.halving.items() if of.most is not None}

    @most_at_once.setter
    def most_at_once(self, known: Mapping[str, int]) -> None:
        for name, of in self.halving.items():
            of.most = known.get(name)

    @property
    def most_tokens(self) -> int:
        """Return the most padded tokens in a forward of an evaluation, unless one row has more."""
        return EVAL_TOKENS if self.forward.device.type == "cpu" else EVAL_TOKENS_GPU

    def log_p_of_bases(
        self, rows: Sequence[Candidates], first: int = 0, every: int = 1
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Sum the log-probabilities of each calibrated row's gold candidate behind its base.

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
            UserError: as :meth:`score_all`.
        """
        for chosen in self._batches(rows, done=done):
            batch = [rows[i] for i in chosen]
            parts = self.halving["scores"](batch, self._num_tokens, self._features_on_cpu)
            features = torch.cat(parts)
            for i, is_finite in zip(chosen, features.isfinite().all(1).tolist(), strict=True):
                if not is_finite:
                    raise NonFiniteScore(f"the hidden state of row {rows[i].id} is not finite")
            yield chosen, features

    @torch.inference_mode()
    def _features_on_cpu(self, batch: Sequence[Candidates]) -> Tensor:
        return self.features(batch).double().cpu()

    def _batches(
        self,
        rows: Sequence[Candidates],
        first: int = 0,
        every: int = 1,
        done: Collection[int] = (),
    ) -> Iterator[list[int]]:
        """Yield indices of rows of like length, each a forward, and count them."""
        tokens = [self._num_tokens(row) for row in rows]
        for chosen in batches_of_like_length(tokens, self.most_tokens, first, every, done):
            self.num_forwards += 1
            yield chosen

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

        Raises:
            UserError: as :meth:`score_all`.
        """
        for chosen in self._batches_of_answers(rows, first, every, done):
            batch = [rows[i] for i in chosen]
            parts = self.halving["answers"](batch, _tokens_of_answer, self.generate)
            yield chosen, [text for part in parts for text in part]

    @staticmethod
    def _batches_of_answers(
        rows: Sequence[Candidates], first: int = 0, every: int = 1, done: Collection[int] = ()
    ) -> list[list[int]]:
        """Return indices of rows of like length that are generated together."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].context))
        starts = range(0, len(order), EVAL_ANSWERS)
        finished = frozenset(done)
        batches = [order[start : start + EVAL_ANSWERS] for start in starts]
        left = [chosen for chosen in batches if not finished.issuperset(chosen)]
        return left[first::every]


def _tokens_of_answer(row: Candidates) -> int:
    return len(row.context) + row.max_new_tokens

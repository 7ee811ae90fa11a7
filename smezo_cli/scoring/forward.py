"""Run a language model so that its output layer computes only the logits that are read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from smezo_cli.scoring.kept_inputs import KeptInputs
from smezo_cli.zo.probe import only_rows


class Forward:
    """Compute a model's logits at chosen positions, and nothing else of the output layer.

    Args:
        model: a language model of transformers.
        pad_id: the token that pads sequences; it needs a row in the embedding.
        compute_dtype: of matrix products, whatever the weights are stored in; None: as they are.
        places_before: positions that the model itself puts before every text: an adapter's.
    """

    def __init__(
        self,
        model: nn.Module,
        pad_id: int,
        compute_dtype: torch.dtype | None = None,
        places_before: int = 0,
    ) -> None:
        self.model, self.pad_id = model, pad_id
        self.compute_dtype, self.places_before = compute_dtype, places_before
        # Whether the model calls its output layer. A forward that is computed tells; one that
        # replays what another computed (executor=lockstep) calls nothing.
        self._calls_head = False
        #: what enters the output layer keeps a first dimension that goes over the sequences
        self.keeps_rows = False
        #: what enters the first trained block, where that is kept: see :meth:`giving`
        self.kept: KeptInputs | None = None
        self._before: Callable[[], None] = lambda: None

    @property
    def device(self) -> torch.device:
        """Return the device of the first weights, where inputs go."""
        return next(self.model.parameters()).device

    @property
    def head(self) -> Any:
        """Return the output layer; None where the model has none that gives its logits alone."""
        return self.model.get_output_embeddings()  # type: ignore[operator]  # transformers' own

    def computing(self) -> AbstractContextManager[Any]:
        """Compute matrix products in the compute dtype within the context: that of a forward."""
        self._before()
        if self.compute_dtype is None:
            return nullcontext()
        # Its cache of cast weights would outlive a probe's scratch.
        return torch.autocast(self.device.type, self.compute_dtype, cache_enabled=False)

    @contextmanager
    def calling(self, before: Callable[[], None]) -> Iterator[None]:
        """Call a function before each forward within the context; it may raise, to end them."""
        self._before, outer = before, self._before
        try:
            yield
        finally:
            self._before = outer

    def tensor(self, values: Any) -> Tensor:
        """Return numbers as int64 on the model's device."""
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def padded(self, sequences: Sequence[Sequence[int]], padding: int | None = None) -> Tensor:
        """Return sequences as one tensor (sequences, longest), padded on the right."""
        width = max(map(len, sequences))
        padding = self.pad_id if padding is None else padding
        return self.tensor([[*s, *[padding] * (width - len(s))] for s in sequences])

    def giving(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None
    ) -> AbstractContextManager[None]:
        """Inside, a forward over these sequences begins at the block whose inputs are kept, if any.

        Args:
            sequences: whole; as :meth:`padded` they are the model's ``input_ids``.
            starts: how many tokens of each are in a cache, and not among these ids; None: the
                forward has no cache.
        """
        return nullcontext() if self.kept is None else self.kept.giving(sequences, starts)

    def evaluating(
        self, name: str, keeps: bool, is_cached: bool = True
    ) -> AbstractContextManager[None]:
        """Inside, forwards are those of an evaluation: what is kept of its batches is used, if any.

        Args:
            name: under which batches are kept.
            keeps: keep what enters the block of batches that are not kept yet.
            is_cached: the cache is of the model as it computes now.
        """
        if self.kept is None:
            return nullcontext()
        return self.kept.evaluating(name, keeps, is_cached)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Make the model compute all its blocks within the context, whatever is kept."""
        kept, self.kept = self.kept, None
        try:
            yield
        finally:
            self.kept = kept

    def logits_at(
        self, places: Sequence[tuple[int, int]], vocabulary: Sequence[int] | None, **inputs: Any
    ) -> Tensor:
        """Return logits (places, vocabulary); the output layer computes nothing else.

        Args:
            places: (sequence, position) of each.
            vocabulary: the output rows wanted; None: all.
            inputs: of the model's forward.
        """
        sequences, positions = self.tensor(list(zip(*places, strict=True)))
        head = self.head
        columns, spread = self._by_sequence(places) if self.keeps_rows else (None, positions)

        def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            self._calls_head = True
            hidden, *others = args  # (sequences, positions, hidden), perhaps of several points
            if columns is not None:
                at = spread.to(hidden.device)
                return (hidden[torch.arange(len(at), device=at.device)[:, None], at], *others)
            at = sequences.to(hidden.device), positions.to(hidden.device)
            points = hidden.shape[0] // len(inputs["input_ids"])
            return (hidden.view(points, -1, *hidden.shape[1:])[(slice(None), *at)], *others)

        handle = head.register_forward_pre_hook(pick) if isinstance(head, nn.Module) else None
        rows = None if vocabulary is None else self.tensor(vocabulary)
        try:
            with self.vocabulary(rows) as narrowed:
                logits: Tensor = self.model(**inputs).logits
        finally:
            if handle is not None:
                handle.remove()
        if not self._calls_head:
            logits = logits[sequences, positions]
        else:
            logits = logits[0] if columns is None else logits[sequences, columns]
        return logits if narrowed else logits[:, rows]

    def _by_sequence(self, places: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return the column of each place among those of its sequence, and all positions.

        These are (sequences, most places of one), where those with fewer repeat their last.
        """
        of: dict[int, list[int]] = {}
        columns = []
        for sequence, position in places:
            columns.append(len(of.setdefault(sequence, [])))
            of[sequence].append(position)
        width = max(map(len, of.values()))
        spread = [of[i] + of[i][-1:] * (width - len(of[i])) for i in sorted(of)]
        return self.tensor(columns), self.tensor(spread)

    @contextmanager
    def vocabulary(self, rows: Tensor | None) -> Iterator[bool]:
        """Make the output layer compute only these rows within the context; False: it cannot."""
        head = self.head
        if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
            with only_rows(head, rows) if rows is not None else nullcontext():
                yield True
        else:  # a head that is wrapped or of another make
            yield rows is None

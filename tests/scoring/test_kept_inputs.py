"""Forwards that begin at the first trained block, against those of the whole model."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smezo_cli.errors import UserError
from smezo_cli.methods.mezo import MeZO
from smezo_cli.models.blocks import blocks_of
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.kept_inputs import KeptInputs, KeptRows
from smezo_cli.scoring.scorer import Scorer
from tests.scoring.test_scorer import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-gemma3", "tiny-opt", "tiny-roberta"]
CAUSAL = FAMILIES[:-1]
MASK = 334  # the last token of the built-in tokenizer
# Numbers of size 4 are 5e-7 apart in fp32; a row alone and one in a batch are sums in other orders.
FP32 = 3e-6
# bf16 keeps 8 bits: a logit of size 4 is known to 1.6e-2.
BF16 = 0.03


def ids_of(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, 260, (length,), generator=generator).tolist())


def labelled(lengths: Sequence[int], *, masked: bool = False) -> list[Candidates]:
    """One row for each length, with two labels of one token behind it, or in the mask's place."""
    rows = []
    for k, length in enumerate(lengths):
        context, at = ids_of(length, k), length // 2
        if masked:
            head, tail = context[:at], context[at + 1 :]
            full = tuple((*head, word, *tail) for word in (300, 310))
            more: dict[str, Any] = {"mask": at, "context": (*head, MASK, *tail)}
        else:
            full, more = tuple((*context, word) for word in (300, 310)), {}
        rows.append(Candidates(full, (1, 1), k % 2, False, id=str(k), **more))
    return rows


def with_options(lengths: Sequence[int], options: Sequence[int]) -> list[Candidates]:
    """One row for each length, with options of so many tokens behind it."""
    return [
        Candidates(
            tuple((*ids_of(length, k), *ids_of(n, 100 + 10 * k + n)) for n in options),
            tuple(options),
            k % len(options),
            False,
            "choice",
            id=str(k),
        )
        for k, length in enumerate(lengths)
    ]


def scorer_of(name: str, dtype: torch.dtype = torch.float32) -> Scorer:
    model, tokenizer = tiny(name, dtype)
    model.eval()
    return Scorer(model, tokenizer)


@contextmanager
def keeping(
    scorer: Scorer, first: int = 1, budget: int = 1 << 30, folder: Path = Path("/nowhere")
) -> Iterator[KeptInputs]:
    """Let the scorer's model begin at a block."""
    blocks = blocks_of(scorer.model)
    assert blocks is not None
    is_masked = "Masked" in type(scorer.model).__name__
    rows = KeptRows(budget, folder)
    kept = KeptInputs(blocks.body, blocks.modules, first, is_masked, rows)
    scorer.forward.kept = kept
    try:
        yield kept
    finally:
        scorer.forward.kept = None
        kept.remove()


def counted(scorer: Scorer) -> list[int]:
    """Return a list that grows by one with each call of the first block's own attention."""
    calls: list[int] = []
    blocks = blocks_of(scorer.model)
    assert blocks is not None
    attention = next(m for n, m in blocks.modules[0].named_children() if "att" in n)
    attention.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("first", [1, 2])  # 2: behind the last block
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_and_losses_are_those_of_the_whole_model(name: str, first: int) -> None:
    scorer, rows = scorer_of(name), labelled([1, 12, 3, 30, 7, 30], masked=name == FAMILIES[-1])
    calls = counted(scorer)
    with torch.no_grad():
        whole, alone = scorer.scores(rows), [scorer.scores([row]) for row in rows]
        loss = scorer.loss(rows)
        with keeping(scorer, first):
            torch.testing.assert_close(scorer.scores(rows), whole, rtol=0, atol=FP32)
            calls.clear()
            # The same rows in batches of the same shape: the same bits.
            assert all(map(torch.equal, (scorer.scores([row]) for row in rows), alone))
            torch.testing.assert_close(scorer.loss(rows), loss, rtol=0, atol=FP32)
            assert not calls  # each row was computed before
            with scorer.forward.whole():
                assert torch.equal(scorer.scores(rows), whole)
            assert calls
        assert torch.equal(scorer.scores(rows), whole)  # nothing is left in the model


def scored(scorer: Scorer, rows: list[Candidates], *, keeps: bool) -> Tensor:
    """The scores of an evaluation."""
    found = torch.zeros(len(rows), max(len(row.full) for row in rows))
    with scorer.forward.evaluating("test", keeps):
        for chosen, batch in scorer.score_all(rows):
            found[chosen] = batch
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_second_evaluation_skips_blocks_and_gives_the_bits_of_the_whole_model(name: str) -> None:
    """Rows of 90 tokens and fewer make several batches; they are padded as in the first one."""
    lengths = [90, 90, 40, 88, 3, 1, 61, 90, 90, 12, 7]
    scorer, rows = scorer_of(name), labelled(lengths, masked=name == FAMILIES[-1])
    calls = counted(scorer)
    whole = scored(scorer, rows, keeps=True)
    assert len(calls) > 1
    with keeping(scorer, budget=4000, folder=Path("/tmp")) as kept:
        for keeps, is_computed in [(False, True), (True, True), (False, False), (True, False)]:
            calls.clear()
            found = scored(scorer, rows, keeps=keeps)
            assert torch.equal(found, whole)
            assert bool(calls) is is_computed, keeps
        # With the second block moved they are the whole model's as well.
        with torch.no_grad():
            blocks = blocks_of(scorer.model)
            assert blocks is not None
            next(blocks.modules[1].parameters()).mul_(1.1)
        moved = scored(scorer, rows, keeps=False)
        with scorer.forward.whole():
            assert torch.equal(moved, scored(scorer, rows, keeps=False))
        assert not torch.equal(moved, whole)
        assert kept.has_batches("test")
        assert not kept.has_batches("dev")
        kept.forget("test")
        assert len(kept.rows) == kept.rows.held_bytes == 0
        calls.clear()
        assert torch.equal(scored(scorer, rows, keeps=False), moved)
        assert calls


def test_a_row_of_a_step_has_its_own_states_whatever_an_evaluation_keeps() -> None:
    scorer, rows = scorer_of("tiny-llama"), labelled([9, 4, 17])
    with torch.no_grad():
        with keeping(scorer):
            alone = scorer.scores(rows)
        with keeping(scorer):
            scored(scorer, rows, keeps=True)
            assert torch.equal(scorer.scores(rows), alone)


@pytest.mark.parametrize("always", [False, True])  # a prefix of all options runs first
@pytest.mark.parametrize("name", CAUSAL)
def test_options_of_many_tokens_are_scored_as_by_the_whole_model(name: str, always: bool) -> None:
    scorer, rows = scorer_of(name), with_options([20, 5, 33], [3, 1, 6])
    scorer.always_caches = always
    with torch.no_grad():
        whole, loss = scorer.scores(rows), scorer.loss(rows)
        with keeping(scorer):
            for is_evaluation in (False, False, True, True):
                if is_evaluation:
                    found = scored(scorer, rows, keeps=True)
                    torch.testing.assert_close(found, whole, rtol=0, atol=2 * FP32)
                # A mean over tokens of their log-probabilities, of size 8.
                torch.testing.assert_close(scorer.scores(rows), whole, rtol=0, atol=2 * FP32)
                torch.testing.assert_close(scorer.loss(rows), loss, rtol=0, atol=2 * FP32)


def test_a_prefix_is_kept_once_for_all_of_its_options() -> None:
    """Kept are the states of the prefix, and of each option alone; not those of whole sequences."""
    scorer, (row,) = scorer_of("tiny-llama"), with_options([200], [2, 3, 4, 5])
    scorer.always_caches = True
    with torch.no_grad(), keeping(scorer) as kept:
        scorer.scores([row])
        states = kept.rows.held_bytes // kept.token_bytes
    assert kept.token_bytes == 32 * 4
    # A row's last token is never read; before an option one token of the prefix is.
    assert states == row.prefix + sum(200 + n - 1 - row.prefix for n in (2, 3, 4, 5))


def test_calibrated_rows_are_scored_as_by_the_whole_model() -> None:
    """The base of a row is a sequence of its own."""
    scorer, rows = scorer_of("tiny-llama"), labelled([9, 4, 17])
    (base,) = labelled([2])
    rows = [Candidates(row.full, row.num_option, row.label, False, base=base) for row in rows]
    with torch.no_grad():
        whole = scorer.scores(rows)
        with keeping(scorer) as kept:
            torch.testing.assert_close(scorer.scores(rows), whole, rtol=0, atol=2 * FP32)
        assert len(kept.rows) == 0  # removed


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_the_last_block_are_those_of_the_whole_model(name: str) -> None:
    scorer, rows = scorer_of(name), labelled([11, 4, 23], masked=name == FAMILIES[-1])
    blocks = blocks_of(scorer.model)
    assert blocks is not None

    def gradients() -> list[Tensor]:
        scorer.model.zero_grad()
        scorer.loss(rows).backward()  # type: ignore[no-untyped-call]  # untyped in torch
        return [p.grad.clone() for p in blocks.modules[1].parameters() if p.grad is not None]

    whole = gradients()
    with keeping(scorer):
        # Computed first in an evaluation: its tensors must serve a backpropagation, too.
        with torch.inference_mode():
            scorer.scores(rows)
        given = gradients()
        assert all(p.grad is None for p in blocks.modules[0].parameters())
    assert len(whole) == len(given) > 3
    # Sums over tokens of numbers of size 1, in other orders.
    for mine, theirs in zip(given, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_are_computed_together_are_those_of_the_whole_model(name: str) -> None:
    """The same bits in whatever order they come first; a group is one forward."""
    scorer = scorer_of(name)
    rows = labelled([1, 12, 3, 30, 7, 30], masked=name == FAMILIES[-1])
    ids = [row.context if row.mask is not None else row.full[0][:-1] for row in rows]
    calls, found = counted(scorer), list[Tensor]()
    with torch.no_grad():
        whole = scorer.scores(rows)
        for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 4, 1, 3]):
            with keeping(scorer) as kept:
                kept.compute_together([[ids[k] for k in (0, 2, 4)], [ids[k] for k in (1, 3)]])
                calls.clear()
                for k in order:
                    scorer.scores([rows[k]])
                assert len(calls) == 3  # two groups, and the last row by itself
                found.append(scorer.scores(rows))
                assert len(calls) == 3
    torch.testing.assert_close(found[0], whole, rtol=0, atol=FP32)
    assert torch.equal(found[0], found[1])


def test_states_do_not_hang_on_the_batch_in_which_a_row_came_first() -> None:
    """So a run that goes on computes the same bits, and every rank does."""
    scorer, rows = scorer_of("tiny-llama"), labelled([1, 12, 3, 30, 7])
    with torch.no_grad():
        with keeping(scorer):
            first = scorer.scores(rows)
        with keeping(scorer):
            for some in (rows[3:], rows[1:2], rows[::-1]):
                scorer.scores(some)
            assert torch.equal(scorer.scores(rows), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_memory_does_not_hold_comes_from_a_file_without_a_name(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    scorer, rows = scorer_of("tiny-llama", dtype), labelled([1, 12, 3, 30, 7])
    size = (1 + 12 + 3 + 30 + 7) * 32 * dtype.itemsize
    with torch.no_grad():
        whole = scorer.scores(rows)
        with keeping(scorer):
            held = scorer.scores(rows)
        with keeping(scorer, budget=size // 2, folder=tmp_path) as kept:
            for _ in range(2):
                assert torch.equal(scorer.scores(rows), held)
            assert list(tmp_path.iterdir()) == []
            assert 0 < kept.rows.held_bytes <= size // 2
            assert kept.rows.held_bytes + kept.rows.file_bytes == size
        tolerance = BF16 if dtype == torch.bfloat16 else FP32
        torch.testing.assert_close(held, whole, rtol=0, atol=tolerance)


def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    scorer = scorer_of("tiny-llama")
    with (
        keeping(scorer, budget=0, folder=tmp_path),
        pytest.raises(
            UserError, match=r"cannot take .*No space left on device.* leave keep_inputs"
        ),
    ):
        scorer.scores(labelled([3]))


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_both_executors_measure_the_same_bits(name: str) -> None:
    """In turns, two threads run the model; both begin at the kept block."""
    found = []
    for executor in ("sequential", "lockstep"):
        scorer, rows = scorer_of(name), labelled([6, 6, 2, 15])
        blocks = blocks_of(scorer.model)
        assert blocks is not None
        frozen = [n for n, p in scorer.model.named_parameters() if not blocks.first_trained([p])]
        method = MeZO(scorer.model, lr=1e-3, eps=1e-3, freeze=frozen, executor=executor)
        calls = counted(scorer)
        with keeping(scorer):
            steps = [method.step(_loss(scorer, rows)) for _ in range(3)]
        assert len(calls) == len(rows)  # each once, alone
        found.append([(step.loss, step.scalars) for step in steps])
    assert found[0] == found[1]


def _loss(scorer: Scorer, rows: list[Candidates]) -> Callable[[], Tensor]:
    return lambda: scorer.loss(rows)

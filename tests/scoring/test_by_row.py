"""The losses of rows: they add up to that of the batch; each forward is of the rows it names."""

from typing import Any

import pytest
import torch
from torch import nn

from smezo_cli.methods.grzo import GRZO
from smezo_cli.scoring.batching import ALONE, Batching
from smezo_cli.scoring.by_row import by_row
from smezo_cli.scoring.candidates import Candidates, encode
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.tasks import Prompt
from smezo_cli.zo.move import Key, Move, Term
from tests.scoring import test_sfc
from tests.scoring.test_objectives import KINDS, in_the_mood
from tests.scoring.test_scorer import MULTI_TOKEN, rows_of, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = rows_of([1, 12, 3, 30])
CASES = {
    "classification": "loss",
    "accuracy": "accuracy",
    "labels of two tokens": "loss",
    "calibrated": "loss",
    "masked": "loss",
    "choice": "loss",
    "generation": "loss",
    "f1": "f1",
}


def setting(case: str) -> tuple[Scorer, list[Candidates]]:
    if case == "masked":
        model, tokenizer = tiny("tiny-roberta")
        prompt = Prompt("{text} It was {mask}.", ("terrible", "great"))
        return Scorer(model, tokenizer), encode(TEXTS, prompt, tokenizer, 128)
    kind = {"f1": "generation", "accuracy": "classification"}.get(case, case)
    model, tokenizer = in_the_mood("tiny-llama", kind)
    if kind in KINDS:
        return Scorer(model, tokenizer), KINDS[kind][2](tokenizer)[:4]
    if case == "calibrated":
        return Scorer(model, tokenizer), test_sfc.encoded("sst2", tokenizer)
    return Scorer(model, tokenizer), encode(TEXTS, MULTI_TOKEN, tokenizer, 256)


@pytest.mark.parametrize("batching", [Batching(), Batching(pads=False), ALONE])
@pytest.mark.parametrize("case", CASES)
def test_losses_of_rows_are_those_of_each_row_alone(case: str, batching: Batching) -> None:
    """To rounding of losses of up to 100; and they add up to that of the batch."""
    scorer, rows = setting(case)
    scorer.batching = scorer.batching_of_answers = batching
    found: dict[int, float] = {}
    with torch.no_grad():
        for forward in by_row(scorer, rows, CASES[case]):
            found |= zip(forward.rows, forward.losses().tolist(), strict=True)
        for i, row in enumerate(rows):
            wanted = float(scorer.objective_sum([row], CASES[case]))
            assert found[i] == pytest.approx(wanted, abs=5e-5)
        assert sum(found.values()) == pytest.approx(
            float(scorer.objective_sum(rows, CASES[case])), abs=2e-4
        )
    assert sorted(found) == list(range(len(rows)))


@pytest.mark.parametrize("case", CASES)
def test_each_sequence_is_of_the_row_that_is_named(case: str) -> None:
    """With each row moved along its own direction its loss is that with all moved along it.

    Moves of 0.05 change losses of some 4 by far more than 1e-4.
    """
    scorer, rows = setting(case)
    opt: Any = GRZO(scorer.model, lr=1e-6, eps=0.05, num_rows=len(rows), check=False)
    there = [Move((Term(Key(0, i), 0.05),)) for i in range(len(rows))]
    apart: dict[int, float] = {}
    alike: dict[int, float] = {}
    here: dict[int, float] = {}
    with torch.no_grad():
        for forward in by_row(scorer, rows, CASES[case]):
            here |= zip(forward.rows, forward.losses().tolist(), strict=True)
            of_all = opt.signed.row_mover(0, [there[i] for i in forward.sequences])
            losses = opt.executors.one(forward.losses, of_all).tolist()
            apart |= zip(forward.rows, losses, strict=True)
            for place, row in enumerate(forward.rows):
                of_one = opt.signed.row_mover(0, [there[row]])
                alike[row] = opt.executors.one(forward.losses, of_one).tolist()[place]
    assert apart == pytest.approx(alike, abs=1e-4)
    if CASES[case] == "loss":  # a figure may stay where it is
        assert all(abs(apart[i] - here[i]) > 1e-3 for i in here)


@pytest.mark.parametrize("case", ["classification", "labels of two tokens", "choice", "masked"])
def test_rows_share_forwards(case: str) -> None:
    """Those of like length: not a forward each; every layer sees all sequences of it."""
    scorer, rows = setting(case)
    seen: list[int] = []
    for module in scorer.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    forwards = by_row(scorer, rows)
    assert len(forwards) < len(rows)
    with torch.no_grad():
        for forward in forwards:
            seen.clear()
            forward.losses()
            assert len(forward.rows) == 1 or set(seen) == {len(forward.sequences)}


def test_what_has_no_loss_is_refused() -> None:
    scorer, rows = setting("classification")
    unknown = Candidates(rows[0].full, rows[0].num_option, -1, False)
    for name in ("loss", "accuracy"):
        with pytest.raises(ValueError, match=f"a row without a label has no {name}"):
            by_row(scorer, [*rows, unknown], name)

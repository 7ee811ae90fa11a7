"""Ranks and the methods that take gradients: masks made of them, slopes, and tails trained by them.

A test compares ranks with one process whose micro-batches are their shards.
"""

import itertools
import math
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from smezo_cli.run import parcel
from smezo_cli.scoring.scorer import Scorer
from tests.run.processes import smezo
from tests.run.rank_groups import RUN, Group, few_tokens, together, weights_of
from tests.run.test_ranks import crowded
from tests.run.tiny_runs import SEQUENTIAL, records_of, result_of, run_folder

OF_METHOD = {
    "senszoq": [*("method=senszoq", "lr=1e-2", "sparsity=0.9"), "method.mask_rows=4", SEQUENTIAL],
    "forward_grad": ["method=forward_grad", "lr=1e-3"],
    "mazo": ["method=mazo", "lr=1e-3", "method.mask_rows=4", SEQUENTIAL],
}


def words_of(method: str, *more: str) -> list[str]:
    return ["model=tiny-llama", *OF_METHOD[method], *RUN, "task.prompt=0", *more]


def in_small_pieces() -> None:
    """A file of a tiny model goes in several pieces, too."""
    parcel._PIECE = 1000


@pytest.mark.parametrize(
    ("method", "more"),
    [("senszoq", []), ("senszoq", ["method.frozen_bits=8", "keep=all"]), ("mazo", [])],
)
def test_ranks_train_the_entries_of_rank_0s_mask(
    method: str, more: list[str], tmp_path: Path
) -> None:
    """Bit for bit the run of one process; and two go on where one has ended, by its mask."""
    words = words_of(method, *more)
    ended = together(2, words, tmp_path / "many", [few_tokens, in_small_pieces])
    assert [one.code for one in ended] == [0, 0], ended
    assert not [f for f in (tmp_path / "many" / "rank1" / "runs").rglob("*") if f.is_file()]
    alone = [*words, "micro_batch_size=4"]
    assert smezo(alone, tmp_path / "one", faults=[few_tokens]).code == 0
    many, one = run_folder(tmp_path / "many"), run_folder(tmp_path / "one")
    assert weights_of(many) == weights_of(one)
    assert records_of(many) == records_of(one)
    assert (many / "mask.safetensors").read_bytes() == (one / "mask.safetensors").read_bytes()
    longer = "steps=9"
    ended = together(2, [*words, longer], tmp_path / "one", [few_tokens])
    assert [one.code for one in ended] == [0, 0], ended
    assert "of an earlier start" in ended[0].out
    assert smezo([*alone, longer], tmp_path / "many", faults=[few_tokens]).code == 0
    assert result_of(many)["step"] == result_of(one)["step"] == 9
    assert weights_of(many) == weights_of(one)


@pytest.mark.parametrize(
    ("size", "more", "alone"),
    [
        (2, [], ["micro_batch_size=4"]),
        (2, ["method.num_queries=3", "query_ranks=2"], []),
        (4, ["method.num_queries=2", "query_ranks=2"], ["micro_batch_size=4"]),
        (2, ["micro_batch_size=2"], []),
    ],
)
def test_ranks_share_derivatives(
    size: int, more: list[str], alone: list[str], tmp_path: Path
) -> None:
    """Bit for bit those of one process: sums of shards are exact."""
    words = words_of("forward_grad", *more)
    ended = together(size, words, tmp_path / "many", [few_tokens])
    assert [one.code for one in ended] == [0] * size, ended
    by_one = [word for word in words if not word.startswith("query_ranks")]
    assert smezo([*by_one, *alone], tmp_path / "one", faults=[few_tokens]).code == 0
    many, one = run_folder(tmp_path / "many"), run_folder(tmp_path / "one")
    assert weights_of(many) == weights_of(one)
    assert records_of(many) == records_of(one)


SHARING = ["forward_grad"]


@pytest.mark.parametrize("method", SHARING)
def test_a_rank_that_has_less_room_halves_its_rows(method: str, tmp_path: Path) -> None:
    ended = together(2, words_of(method), tmp_path, [few_tokens, crowded])
    assert [one.code for one in ended] == [0, 0], ended
    assert result_of(run_folder(tmp_path))["rank_micro_batch_sizes"] == [None, 2]


def spoiled(number: int) -> None:
    """The loss that rank 1 computes n-th is NaN."""
    whole, count = Scorer.objective_sum, itertools.count(1)

    def sometimes(self: Any, batch: Any, name: str = "loss") -> Any:
        return whole(self, batch, name) * (math.nan if next(count) == number else 1)

    if os.environ["RANK"] == "1":
        Scorer.objective_sum = sometimes  # type: ignore[method-assign]  # in this process alone


@pytest.mark.parametrize("number", [5, 6])
@pytest.mark.parametrize("method", SHARING)
def test_a_nan_ends_all_ranks(method: str, number: int, tmp_path: Path) -> None:
    """Wherever in a step it is, and at whichever rank."""
    with Group(2, words_of(method), tmp_path, faults=[partial(spoiled, number)]) as group:
        ended = [rank.wait(100) for rank in group.ranks]
    assert [one.code for one in ended] == [2, 0], ended
    assert "loss nan" in ended[0].err
    assert ended[1].err == ""
    assert result_of(run_folder(tmp_path))["status"] == "diverged"


def test_a_mask_that_rank_0_cannot_read_ends_all(tmp_path: Path) -> None:
    ended = together(2, words_of("senszoq", "method.mask_from=nothing"), tmp_path)
    assert [one.code for one in ended] == [2, 0], ended
    assert "method.mask_from=nothing" in ended[0].err
    assert ended[1].err == ""


def crowded_out() -> None:
    """Rank 1 has no temporary folder to hold what it is sent."""
    tempfile.tempdir = "nowhere"


def test_a_mask_that_a_follower_cannot_hold_ends_all(tmp_path: Path) -> None:
    ended = together(2, words_of("mazo"), tmp_path, [crowded_out])
    assert [one.code for one in ended] == [2, 2], ended
    assert "mask.safetensors of rank 0 cannot be kept in nowhere" in ended[1].err
    assert "another rank has ended" in ended[0].err

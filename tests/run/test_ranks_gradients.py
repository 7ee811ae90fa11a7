"""Ranks and the methods that take gradients: masks made of them, slopes, and tails trained by them.

A test compares ranks with one process whose micro-batches are their shards.
"""

import tempfile
from pathlib import Path

import pytest

from smezo_cli.run import parcel
from tests.run.processes import smezo
from tests.run.rank_groups import RUN, few_tokens, together, weights_of
from tests.run.tiny_runs import SEQUENTIAL, records_of, result_of, run_folder

OF_METHOD = {
    "senszoq": [*("method=senszoq", "lr=1e-2", "sparsity=0.9"), "method.mask_rows=4", SEQUENTIAL],
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

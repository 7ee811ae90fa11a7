"""Ranks and the methods that take gradients: masks made of them, slopes, and tails trained by them.

A test compares ranks with one process whose micro-batches are their shards.
"""

import itertools
import math
import os
import signal
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from smezo_cli.errors import UserError
from smezo_cli.run import follower, parcel, ranks
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.store.saved import Saved
from smezo_cli.zo.backprop import Backprop
from tests.run.processes import smezo, until
from tests.run.rank_groups import SHORT_RUN, Group, few_tokens, together, weights_of
from tests.run.test_ranks import crowded
from tests.run.test_ranks_end import steps_made
from tests.run.tiny_runs import SEQUENTIAL, records_of, result_of, run_folder

OF_METHOD = {
    "senszoq": [*("method=senszoq", "lr=1e-2", "sparsity=0.9"), "method.mask_rows=4", SEQUENTIAL],
    "forward_grad": ["method=forward_grad", "lr=1e-3"],
    "elasticzo": ["method=elasticzo", "lr=1e-3", "method.tail_lr=1e-2", SEQUENTIAL],
    "addax": ["method=addax", "lr=1e-2", "method.short_rows=8", SEQUENTIAL],
    "mazo": ["method=mazo", "lr=1e-3", "method.mask_rows=4", SEQUENTIAL],
}


def words_of(method: str, *more: str) -> list[str]:
    return ["model=tiny-llama", *OF_METHOD[method], *SHORT_RUN, *more]


def in_small_pieces() -> None:
    """A file of a tiny model goes in several pieces, too."""
    parcel._PIECE = 1000


@pytest.mark.parametrize(
    ("method", "more"),
    [("senszoq", ["method.frozen_bits=8", "keep=all"]), ("mazo", [])],
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
    ("method", "size", "more", "alone"),
    [
        ("forward_grad", 4, ["method.num_queries=2", "query_ranks=2"], ["micro_batch_size=4"]),
        ("forward_grad", 2, ["micro_batch_size=2"], []),
        ("elasticzo", 2, [], ["micro_batch_size=4"]),
        ("elasticzo", 2, ["method.num_queries=2", "query_ranks=2"], []),
        ("addax", 4, ["method.num_queries=2", "query_ranks=2"], ["micro_batch_size=4"]),
        ("addax", 2, ["method.short_rows=1"], ["micro_batch_size=4"]),  # and one rank has none
    ],
)
def test_ranks_share_derivatives_and_gradients(
    method: str, size: int, more: list[str], alone: list[str], tmp_path: Path
) -> None:
    """Bit for bit those of one process in micro-batches.

    Sums of shards of derivatives are exact; a sum of two gradients, and of zeros, has no order.
    """
    words = words_of(method, *more)
    ended = together(size, words, tmp_path / "many", [few_tokens])
    assert [one.code for one in ended] == [0] * size, ended
    by_one = [word for word in words if not word.startswith("query_ranks")]
    assert smezo([*by_one, *alone], tmp_path / "one", faults=[few_tokens]).code == 0
    many, one = run_folder(tmp_path / "many"), run_folder(tmp_path / "one")
    assert weights_of(many) == weights_of(one)
    assert records_of(many) == records_of(one)


def test_a_gradient_is_sent_in_the_order_of_its_shape() -> None:
    """Of a transposed weight too, whose numbers lie in another order; and all move by the sum."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.arange(6.0).view(2, 3).t())

        def __call__(self) -> torch.Tensor:
            return (self.w.square() / 2).sum().double()

        def queries(self, num: int) -> range:
            return range(num)

        def join(self, losses: Any, sizes: Any) -> Any:
            raise AssertionError("its parts are asked")

        def join_parts(self, found: Any, sizes: Any) -> Any:
            return [[3 * x for x in of] for of in found.values()]

        def join_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
            assert tensor.is_contiguous()
            return 3 * tensor

    model = Three()
    before = model.w.detach().clone()
    Backprop(model, {"w": model.w}).apply(model, 0.125, 0)
    assert torch.equal(model.w, before - 0.125 * 3 * before)


def test_more_shards_of_a_gradient_agree_to_rounding(tmp_path: Path) -> None:
    """Of one step. Sums in another order: 2e-5 of the largest gradient, as of micro-batches.

    What the losses of other shards make of a projected gradient is alpha of it, a thousandth.
    """
    words = [*words_of("addax"), "steps=1", "lr=1"]
    assert smezo(words, tmp_path / "1").code == 0
    assert all(one.code == 0 for one in together(3, words, tmp_path / "3"))
    found = []
    for folder in ("1", "3"):
        path = run_folder(tmp_path / folder) / "checkpoint" / "weights-1.safetensors"
        found.append(load_file(path))
    assert smezo([*words, "lr=1e-30"], tmp_path / "0").code == 0
    before = load_file(run_folder(tmp_path / "0") / "checkpoint" / "weights-1.safetensors")
    moved = max(float((found[0][name] - before[name]).abs().max()) for name in before)
    parted = max(float((found[0][name] - found[1][name]).abs().max()) for name in before)
    assert 0 < parted <= 2e-5 * moved + 1e-3 * 5 * 3e-6 / 2e-3  # alpha, the largest z, the slope


def not_its_folder() -> None:
    """This machine sees what rank 0 sends, and not its run folder."""

    def sent(path: Path) -> Saved:
        if path.parent.name == "checkpoint":
            raise UserError(f"{path} cannot be read")
        return Saved(path)

    follower.Saved = sent  # type: ignore[assignment,misc]  # in this process alone


@pytest.mark.parametrize(
    ("method", "faults"), [("elasticzo", []), ("addax", [not_its_folder, in_small_pieces])]
)
def test_ranks_go_on_from_weights_that_one_process_saved(
    method: str, faults: list[Any], tmp_path: Path
) -> None:
    """From the run folder if they see it; else rank 0 sends what is in it."""
    words, longer = words_of(method, "micro_batch_size=4"), "steps=9"
    assert smezo(words, tmp_path, faults=[few_tokens]).code == 0
    ended = together(2, [*words, longer], tmp_path, [few_tokens, *faults])
    assert [one.code for one in ended] == [0, 0], ended
    assert "going on from step 6" in ended[0].out
    assert smezo([*words, longer], tmp_path / "one", faults=[few_tokens]).code == 0
    many, one = run_folder(tmp_path), run_folder(tmp_path / "one")
    assert weights_of(many) == weights_of(one)
    assert result_of(many)["test"] == result_of(one)["test"]


def gradients_fail(rank: int) -> None:
    """A rank fails amid the gradients of a step."""
    add, count = ranks.Ranks.add_gradient, itertools.count(1)

    def fail(self: ranks.Ranks, tensor: Any) -> Any:
        if next(count) == 5:
            raise MemoryError("no room for a gradient")
        return add(self, tensor)

    if os.environ["RANK"] == str(rank):
        ranks.Ranks.add_gradient = fail  # type: ignore[method-assign]  # in this process alone


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_amid_gradients_leaves_nobody_behind(rank: int, tmp_path: Path) -> None:
    fault = partial(gradients_fail, rank)
    with Group(2, words_of("elasticzo"), tmp_path, faults=[fault]) as group:
        ended = [one.wait(100) for one in group.ranks]
    assert [one.code for one in ended] == [2, 2], ended
    assert "the memory is too small" in ended[rank].err
    assert "no room for a gradient" in ended[rank].err
    assert "another rank has ended" in ended[1 - rank].err


def no_room_backwards(rank: int) -> None:
    """A rank has room for a forward, and not for backpropagation."""
    whole = Scorer.objective_sum

    def crammed(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def heavy(self: Any, batch: Any, name: str = "loss") -> Any:
        found = whole(self, batch, name)
        if found.requires_grad:
            found.register_hook(crammed)
        return found

    if os.environ["RANK"] == str(rank):
        Scorer.objective_sum = heavy  # type: ignore[method-assign]  # in this process alone


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_room_for_backpropagation_ends_all(rank: int, tmp_path: Path) -> None:
    """The others wait for its loss, so that rank 0 can still let them go."""
    fault = partial(no_room_backwards, rank)
    with Group(2, words_of("elasticzo"), tmp_path, faults=[fault]) as group:
        ended = [one.wait(100) for one in group.ranks]
    assert [one.code for one in ended] == ([2, 0] if rank == 0 else [2, 2]), ended
    assert "the memory is too small for backpropagation" in ended[rank].err
    assert "Traceback" not in ended[0].err + ended[1].err


def test_a_stop_between_two_steps_of_ranks_is_gone_on_from(tmp_path: Path) -> None:
    """Of steps that are not recorded: the weights at the stop are saved, and none is lost."""
    words = words_of("elasticzo", "steps=40", "eval_every=20")
    with Group(2, words, tmp_path, faults=[few_tokens]) as group:
        until(lambda: steps_made(tmp_path) > 4)
        os.kill(group.ranks[1].pid, signal.SIGTERM)
        ended = group.wait()
    assert [one.code for one in ended] == [130, 0], ended
    ended = together(2, words, tmp_path, [few_tokens])
    assert [one.code for one in ended] == [0, 0], ended
    assert "going on from step" in ended[0].out
    assert smezo([*words, "micro_batch_size=4"], tmp_path / "one", faults=[few_tokens]).code == 0
    assert weights_of(run_folder(tmp_path)) == weights_of(run_folder(tmp_path / "one"))


def infinite_gradients() -> None:
    """Rank 1 has losses that are finite, and gradients that are not."""
    whole = Scorer.objective_sum

    def steep(self: Any, batch: Any, name: str = "loss") -> Any:
        found = whole(self, batch, name)
        if found.requires_grad:
            found.register_hook(lambda gradient: gradient * math.inf)
        return found

    if os.environ["RANK"] == "1":
        Scorer.objective_sum = steep  # type: ignore[method-assign]  # in this process alone


def test_a_gradient_that_is_not_finite_ends_all_ranks(tmp_path: Path) -> None:
    with Group(2, words_of("addax"), tmp_path, faults=[infinite_gradients]) as group:
        ended = [rank.wait(100) for rank in group.ranks]
    assert [one.code for one in ended] == [2, 0], ended
    assert "is not finite" in ended[0].err
    assert ended[1].err == ""
    assert result_of(run_folder(tmp_path))["status"] == "diverged"


SHARING = ["forward_grad", "elasticzo", "addax"]


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


@pytest.mark.parametrize(
    ("method", "number"), [("forward_grad", 5), ("elasticzo", 5), ("addax", 6)]
)
def test_a_nan_ends_all_ranks(method: str, number: int, tmp_path: Path) -> None:
    """Of what is probed, or of a tail, the third forward of each step."""
    with Group(2, words_of(method), tmp_path, faults=[partial(spoiled, number)]) as group:
        ended = [rank.wait(100) for rank in group.ranks]
    assert [one.code for one in ended] == [2, 0], ended
    assert "nan" in ended[0].err
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

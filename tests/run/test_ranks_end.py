"""Ranks that die, stop, fail, or wait for others: all end, in words, and fewer go on."""

import copy
import functools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.machine import torchrun
from smezo_cli.run import measure, ranks
from smezo_cli.store.partial_scores import NAME
from smezo_cli.zo.optimizer import ZeroOrder
from tests import ROOT
from tests.run.processes import Started, count_batches, smezo, until
from tests.run.rank_groups import RUN, Group, free_port, together, weights_of
from tests.run.tiny_runs import METHODS, result_of, run_folder

# Long enough that a signal after its eighth step comes before its last.
LONG = [*METHODS["sparse_mezo"], *RUN, "steps=30", "eval_every=15"]


def steps_made(cwd: Path) -> int:
    return sum(path.read_text().count('"loss"') for path in cwd.glob("runs/*/*/metrics.jsonl"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process that does all of LONG, with a rank's rows in a forward."""
    cwd = tmp_path_factory.mktemp("one")
    assert smezo([*LONG, "micro_batch_size=4"], cwd).code == 0
    return run_folder(cwd)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_all_and_fewer_go_on(victim: int, one: Path, tmp_path: Path) -> None:
    with Group(2, LONG, tmp_path) as group:
        until(lambda: steps_made(tmp_path) > 8)
        os.kill(group.ranks[victim].pid, signal.SIGKILL)
        group.ranks[victim].kill()
        other = group.ranks[1 - victim].wait(60)
    assert other.code == 2
    assert "another rank has ended" in other.err
    assert "the same command (without if_exists=fresh) goes on" in other.err
    assert "Traceback" not in other.err
    # The rest alone, with a forward's rows as they were: nothing is lost, nothing differs.
    ended = smezo([*LONG, "micro_batch_size=4"], tmp_path)
    assert ended.code == 0, ended.err
    assert "are recorded: applied" in ended.out or "going on from step" in ended.out
    assert weights_of(run_folder(tmp_path)) == weights_of(one)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_stop_of_any_rank_stops_all_between_two_steps(asked: int, tmp_path: Path) -> None:
    with Group(2, LONG, tmp_path) as group:
        until(lambda: steps_made(tmp_path) > 8)
        os.kill(group.ranks[asked].pid, signal.SIGTERM)
        ended = group.wait()
    assert [one.code for one in ended] == [130, 0]
    assert "stopped; the same command goes on" in ended[0].out
    assert result_of(run_folder(tmp_path))["status"] == "stopped"


def term_at_batch(rank: int, number: int) -> None:
    """SIGTERM to one rank at its n-th batch of all evaluations; every rank notes its batches."""
    mine = os.environ.get("RANK") == str(rank)
    count_batches(number if mine else math.inf)


SCORED = [*METHODS["sparse_mezo"], *RUN, "task.prompt=0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two ranks that noted their batches and were never stopped."""
    cwd = tmp_path_factory.mktemp("whole")
    assert [rank.code for rank in together(2, SCORED, cwd, [count_batches])] == [0, 0]
    return cwd


@pytest.mark.parametrize("asked", [0, 1])
def test_a_stop_of_any_rank_stops_all_between_two_batches(
    asked: int, whole: Path, tmp_path: Path
) -> None:
    """All ranks break off at once, what all have scored is kept, and no rank scores it again."""
    words, part = SCORED, tmp_path / "part"
    made, batches = [0, 0], [(whole / of / "batches").read_text() for of in ("", "rank1")]
    total = [text.count("\n") for text in batches]
    # In dev before training, in a look, in the test.
    for number in (1, total[asked] // 2, 1, total[asked] // 3):
        stop = functools.partial(term_at_batch, asked, number)
        ended = together(2, words, part, [stop])
        assert [one.code for one in ended] == [130, 0], [one.err for one in ended]
        assert "kept the scores of" in ended[0].out
        now = [(part / of / "batches").read_text().count("\n") for of in ("", "rank1")]
        assert max(abs(now[k] - made[k] - number) for k in (0, 1)) <= 2
        made = now
    assert [one.code for one in together(2, words, part, [count_batches])] == [0, 0]
    found = [(part / of / "batches").read_text() for of in ("", "rank1")]
    assert sorted("".join(found).split("\n")) == sorted("".join(batches).split("\n"))
    assert weights_of(run_folder(part)) == weights_of(run_folder(whole))
    for name in ("scores.safetensors", "predictions-test.jsonl"):
        files = [(run_folder(of) / name).read_bytes() for of in (part, whole)]
        assert files[0] == files[1]
    assert not (run_folder(part) / NAME).exists()


def test_a_nan_ends_all_ranks(tmp_path: Path) -> None:
    words = [*METHODS["mezo"], *RUN, "lr=1e30"]
    ended = together(2, words, tmp_path)
    assert [one.code for one in ended] == [2, 0]
    assert "lower it" in ended[0].err
    assert result_of(run_folder(tmp_path))["status"] == "diverged"


def rank_1_fails() -> None:
    """In its first step."""

    def fail(*_: object) -> None:
        raise UserError("no room")

    if os.environ["RANK"] == "1":
        measure.Measure.step = fail  # type: ignore[assignment]  # in this process alone


def test_a_follower_that_fails_ends_a_sweep_on_all_ranks(tmp_path: Path) -> None:
    """Its process goes on to the next job, so no connection is closed by its death."""
    words = ["--multirun", *METHODS["mezo"], *RUN, "seed=0,1"]
    with Group(2, words, tmp_path, faults=[rank_1_fails]) as group:
        first, second = (rank.wait(100) for rank in group.ranks)
    assert (first.code, second.code) == (2, 2)
    assert "rank 1: job 0" in second.err
    assert "no room" in second.err
    assert "another rank has ended" in first.err


def update_fails(step: int) -> None:
    """Rank 0 has no room to move its weights, after all losses of a step are known."""
    apply = ZeroOrder._apply

    def fail(self: ZeroOrder, scalars: Sequence[float]) -> None:
        if self.num_steps == step:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        apply(self, scalars)

    if os.environ["RANK"] == "0":
        ZeroOrder._apply = fail  # type: ignore[method-assign]  # in this process alone


@pytest.mark.parametrize("step", [1, 2], ids=["in the middle", "the last before dev"])
def test_an_update_that_fails_on_rank_0_leaves_nobody_behind(step: int, tmp_path: Path) -> None:
    """Followers wait in the next step's exchange, or for a command: dev comes each third step."""
    fault = functools.partial(update_fails, step)
    with Group(2, [*METHODS["mezo"], *RUN], tmp_path, faults=[fault]) as group:
        ended = [rank.wait(100) for rank in group.ranks]
    assert [one.code for one in ended] == [2, 0], ended
    assert "the memory is too small for this run (CUDA out of memory.)" in ended[0].err
    assert ended[1].err == ""


class Heard(ranks.Ranks):
    """A rank 0 whose followers add nothing; what is exchanged is noted, by its length."""

    def __init__(self) -> None:
        self.rank, self.size, self.lost = 0, 2, False
        self.lengths: list[int] = []
        self.begin(check(compose([*METHODS["mezo"], *RUN])))

    def _add(self, numbers: Sequence[float]) -> list[float]:
        self.lengths.append(len(numbers))
        return list(numbers)

    def tell(self, do: str, content: bytes = b"", **about: Any) -> None:
        self.lengths.append(0)


def leaves_with(team: Heard) -> list[int]:
    """The lengths of what is exchanged when rank 0 ends the run; 0 is a command."""
    team.lengths.clear()
    team.leave()
    return team.lengths


def test_after_a_loss_that_is_not_finite_exchanges_have_their_own_length() -> None:
    """One number of an evaluation or of weights, and the two that go with every exchange."""
    team = Heard()
    team.begin_steps(3, width=6)
    assert team.add([1.0, math.nan]) == pytest.approx([1.0, math.nan], nan_ok=True)
    team.lengths.clear()
    team.hand_out("path", "sha256")
    team.evaluate()
    assert team.goes_on(has_scored=True)
    assert team.lengths == [0, 3, 0, 3]
    assert leaves_with(team) == [3, 0]


@pytest.mark.parametrize("is_asked", [False, True])
@pytest.mark.parametrize("num", [1, 2])
def test_rank_0_leaves_the_exchange_that_others_are_in(num: int, is_asked: bool) -> None:
    """Of a step that has all its losses that is the next step's, or none after the last."""
    team = Heard()
    team.begin_steps(num, width=4)
    team.asked = lambda: is_asked
    team.add([1.0, 2.0, 3.0, 4.0])
    before = copy.copy(team)
    assert leaves_with(before) == [6, 0]  # a step may have more exchanges
    team.measured()
    is_last = num == 1 or is_asked
    assert leaves_with(team) == ([0] if is_last else [6, 0])


def stopped_late() -> None:
    """Rank 0 is asked to stop just after the ranks have told each other that none was."""
    real = ranks.Ranks.goes_on

    def goes_on(self: ranks.Ranks, has_scored: bool) -> bool:
        found = real(self, has_scored)
        if not found and self.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    ranks.Ranks.goes_on = goes_on  # type: ignore[method-assign]  # in this process alone


def test_a_stop_between_an_evaluation_and_its_sum_leaves_nobody_behind(tmp_path: Path) -> None:
    with Group(2, [*METHODS["mezo"], *RUN], tmp_path, faults=[stopped_late]) as group:
        ended = [rank.wait(100) for rank in group.ranks]
    assert [one.code for one in ended] == [130, 0]
    assert "stopped; the same command goes on" in ended[0].out


# ----------------------------------------------------------------- variables that were left behind


def impatient() -> None:
    ranks._PATIENCE = 0.2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_others_says_so_within_seconds(rank: int, tmp_path: Path) -> None:
    """Which variables, which address, how many have come, how to run alone; then it goes on."""
    port = free_port()
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"GLOO_SOCKET_IFNAME": "lo"}
    words = [*METHODS["mezo"], *RUN, "steps=2"]
    cwd = {k: tmp_path / str(k) for k in (0, 1)}
    first = Started(words, cwd[rank], env={**env, "RANK": str(rank)}, faults=[impatient])
    with first:
        until(lambda: list(cwd[rank].glob("0.err")) and (cwd[rank] / "0.err").read_text())
        said = (cwd[rank] / "0.err").read_text()
        assert said.count("\n") == 1
        assert said.startswith(f"smezo: rank {rank} waits for the others: ")
        what = f"1 of 2 have come to 127.0.0.1:{port} (" if rank == 0 else "nobody answers at "
        assert what in said
        for name in ("RANK=", "WORLD_SIZE=2", "MASTER_ADDR=", f"MASTER_PORT={port} "):
            assert name in said
        assert said.endswith("to run alone: unset RANK WORLD_SIZE\n")
        other = smezo(words, cwd[1 - rank], env={**env, "RANK": str(1 - rank)})
        assert (other.code, first.wait().code) == (0, 0)


def test_a_rank_that_waits_can_be_stopped(tmp_path: Path) -> None:
    """Ctrl-C, and there is no traceback."""
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(free_port())}
    words = [*METHODS["mezo"], *RUN]
    with Started(words, tmp_path, env=env, faults=[impatient]) as waiting:
        until(lambda: list(tmp_path.glob("0.err")) and (tmp_path / "0.err").read_text())
        os.kill(waiting.pid, signal.SIGINT)
        ended = waiting.wait(60)
    assert ended.code == 130
    assert "Traceback" not in ended.err


CLOSED = """
import os
from smezo_cli.run.ranks import Ranks

def threads():
    names = (open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task"))
    return sum("gloo" in name for name in names)

for port, lost in PORTS.items():
    os.environ["MASTER_PORT"] = port
    team = Ranks("gloo")
    import torch._dynamo  # as models do, after the ranks have met
    assert team.gather(b"all") == [b"all"]
    assert threads() > 0
    team.lost = lost
    team._close()
    print(threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_the_threads_of_ranks_end_before_python_does(tmp_path: Path) -> None:
    """One that outlives Python may abort the process at its very end, after all is done.

    The second team is one whose other rank was lost.
    """
    env = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    env |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    ports = {str(free_port()): False, str(free_port()): True}
    ended = subprocess.run(
        [sys.executable, "-c", CLOSED.replace("PORTS", repr(ports))],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "0\n0\n"), ended.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"RANK": "2"}, "RANK=2 must be less than WORLD_SIZE=2"),
        ({"WORLD_SIZE": "0"}, "RANK=0 must be less than WORLD_SIZE=0"),
        ({"RANK": "-1"}, "RANK=-1 is no whole number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no whole number"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x is no whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        ({"RANK": ""}, None),
        ({"WORLD_SIZE": ""}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"MASTER_ADDR": ""}, None),
    ],
)
def test_variables_that_make_no_rank_are_a_sentence_or_none(
    more: dict[str, str], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An incomplete set, or a world of one, is a process of its own."""
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (whole | more).items():
        monkeypatch.setenv(name, value)
    settings = check(compose([*METHODS["mezo"], *RUN]))
    assert torchrun.local_rank() is None
    assert torchrun.speaker() == ""  # nobody else will say it
    if words is None:
        assert ranks.join(settings) is None
        return
    with pytest.raises(UserError, match=words) as caught:
        ranks.join(settings)
    assert "unset RANK WORLD_SIZE" in str(caught.value)

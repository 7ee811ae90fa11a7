"""Several ranks train the weights of one process: shares, steps, and going on as more.

Ranks are forked with the variables that torchrun sets; test_ranks_links.py has torchrun itself.
"""

import importlib.util
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smezo_cli import train
from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.machine.out_of_memory import OutOfMemory
from smezo_cli.run import follower, ranks
from smezo_cli.scoring import scorer
from tests.run.processes import Fault, Started, smezo, until
from tests.run.rank_groups import RUN, SHORT_RUN, few_tokens, together, weights_of
from tests.run.tiny_runs import METHODS, records_of, result_of, run_folder


@pytest.mark.parametrize(
    ("method", "size", "more", "alone"),
    [
        # Rows are cut as micro-batches of one process are: the same bits.
        ("sparse_mezo", 2, [], ["micro_batch_size=4"]),
        ("mezo", 4, [], ["micro_batch_size=2"]),
        (
            "sparse_mezo",
            2,
            ["micro_batch_size=2", "batch_order=stratified"],
            ["micro_batch_size=2"],
        ),
        # Queries are measured as one process measures them.
        ("mezo", 2, ["method.num_queries=3", "query_ranks=2"], []),
        ("mezo_adam", 4, ["method.num_queries=2", "query_ranks=2"], ["micro_batch_size=4"]),
        # A step has two exchanges, of other lengths: 2 and 3 losses, or 6 and 3.
        ("mezo", 2, ["method=zo_conservative"], ["micro_batch_size=4"]),
        ("mezo", 2, ["method=zo_conservative", "method.num_queries=3", "query_ranks=2"], []),
        # The rows of an anchor are fewer than the ranks.
        ("mezo", 2, ["method=mezo_svrg", "method.full_rows=1"], ["micro_batch_size=4"]),
    ],
)
def test_ranks_train_the_weights_of_one_process(
    method: str, size: int, more: list[str], alone: list[str], tmp_path: Path
) -> None:
    """Bit for bit: losses, projected gradients, looks at dev, test scores and weights.

    The first chooses its prompt and scores it before training, too.
    """
    words = [*METHODS[method], *(SHORT_RUN if more or size == 4 else RUN), *more]
    ended = together(size, words, tmp_path / "many", [few_tokens])
    assert [one.code for one in ended] == [0] * size, ended[0].err
    assert all(one.out == "" for one in ended[1:])  # one writer, one voice
    written = [f for k in range(1, size) for f in (tmp_path / f"many/rank{k}/runs").rglob("*")]
    assert not [f for f in written if f.is_file()]
    by_one = [word for word in words if not word.startswith("query_ranks")]
    assert smezo([*by_one, *alone], tmp_path / "one", faults=[few_tokens]).code == 0
    many, one = run_folder(tmp_path / "many"), run_folder(tmp_path / "one")
    assert weights_of(many) == weights_of(one)
    assert records_of(many) == records_of(one)
    for name in ("scores.safetensors", "predictions-test.jsonl"):
        assert (many / name).read_bytes() == (one / name).read_bytes()
    result = result_of(many)
    assert (result["rank"], result["world_size"]) == (0, size)
    assert len(result["rank_peak_memory_bytes"]) == size
    assert min(result["rank_peak_memory_bytes"]) > 1 << 20


def crowded() -> None:
    """Rank 1 has room for two rows."""
    whole = scorer.Scorer.objective_sum

    def narrow(self: Any, batch: Any, name: str = "loss") -> Any:
        if os.environ["RANK"] == "1" and len(batch) > 2:
            raise OutOfMemory("no room")
        return whole(self, batch, name)

    scorer.Scorer.objective_sum = narrow  # type: ignore[method-assign]  # in this process alone


def test_a_rank_that_has_less_room_halves_its_rows_and_that_is_said(tmp_path: Path) -> None:
    ended = together(2, [*METHODS["mezo"], *RUN], tmp_path, [few_tokens, crowded])
    assert [one.code for one in ended] == [0, 0], ended[0].err
    assert result_of(run_folder(tmp_path))["rank_micro_batch_sizes"] == [None, 2]
    assert "rank 1 was out of memory: it ended with 2 rows at once" in ended[0].out


def test_ranks_share_answers_that_are_generated(tmp_path: Path) -> None:
    """Their texts go over the wire at looks; of a step the sums of F1 alone."""
    rows = [{"question": f"word {i}", "answer": f"word {i % 3}"} for i in range(60)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["task=generation", f"task.data={tmp_path}/qa.jsonl", "task.prompt='{question}:'"]
    words += ["task.num_train=16", "task.num_dev=19", "task.num_test=17", "task.max_new_tokens=3"]
    words += ["device=cpu", *METHODS["mezo"], *RUN[5:], "method.objective=f1"]
    assert [one.code for one in together(2, words, tmp_path / "many")] == [0, 0]
    assert smezo([*words, "micro_batch_size=4"], tmp_path / "one").code == 0
    many, one = run_folder(tmp_path / "many"), run_folder(tmp_path / "one")
    assert records_of(many) == records_of(one)
    name = "predictions-test.jsonl"
    assert (many / name).read_bytes() == (one / name).read_bytes()


def test_the_losses_of_another_number_of_ranks_agree_to_rounding(tmp_path: Path) -> None:
    """Other rows in a forward round otherwise: float32, 1e-6 of a loss, 1 / 2 eps of that."""
    words = [*METHODS["mezo"], *RUN, "steps=1", "eps=1e-2"]
    found = {}
    for size in (1, 3):
        if size == 1:
            assert smezo(words, tmp_path / "1").code == 0
        else:
            assert all(one.code == 0 for one in together(size, words, tmp_path / "3"))
        found[size] = records_of(run_folder(tmp_path / str(size)))[0]
    assert found[1]["loss"] == pytest.approx(found[3]["loss"], rel=3e-6)
    (one,), (three,) = found[1]["projected_grad"], found[3]["projected_grad"]
    assert one == pytest.approx(three, abs=3e-6 / 2e-2)
    assert found[1] != found[3]  # else the tolerance says nothing


def test_one_process_is_gone_on_with_by_more(tmp_path: Path) -> None:
    """Followers have the base model and the recorded steps alone; refreshed masks and all."""
    words = [*METHODS["sparse_mezo"], *RUN, "micro_batch_size=2"]
    assert smezo(words, tmp_path).code == 0
    longer = [*words, "steps=11"]
    ended = together(2, longer, tmp_path)
    assert [one.code for one in ended] == [0, 0], ended
    assert smezo(longer, tmp_path / "one").code == 0
    assert weights_of(run_folder(tmp_path)) == weights_of(run_folder(tmp_path / "one"))


def test_the_jobs_of_a_sweep_follow_each_other_on_all_ranks(tmp_path: Path) -> None:
    """One is done already, one is refused for its folder, one trains; a run is one folder."""
    words = [*METHODS["mezo"], *RUN]
    assert smezo([*words, "seed=0"], tmp_path).code == 0
    taken = tmp_path / "runs" / "default"
    with Started([*words, "seed=1", "steps=100000"], tmp_path) as held:
        until(lambda: list(taken.glob("*-s1-*/trajectory.bin")))
        os.kill(held.pid, signal.SIGSTOP)  # it holds the folder, and computes nothing
        assert held.alive
        ended = together(2, ["--multirun", *words, "seed=0,1,2"], tmp_path)
    assert [one.code for one in ended] == [2, 0]
    assert "done already" in ended[0].out
    assert "is in use by process" in ended[0].err
    scores = [result_of(f)["status"] for f in sorted(taken.iterdir()) if "-s2-" in f.name]
    assert scores == ["done"]


def test_ranks_with_other_data_are_refused(tmp_path: Path) -> None:
    """Each machine reads its own files."""
    for place, word in (("", "good"), ("rank1", "bad")):
        (tmp_path / place).mkdir(exist_ok=True)
        rows = [{"text": f"{word} {i}", "label": i % 2} for i in range(40)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / place / "my.jsonl").write_text(lines)
    own = ["task=classification", "task.data=my.jsonl", "task.prompt='{text} is'"]
    own += ["task.labels={0: bad, 1: good}", "task.num_train=16", "task.num_dev=8"]
    words = [*METHODS["mezo"], *RUN[5:], *own, "device=cpu"]
    ended = together(2, words, tmp_path)
    assert [one.code for one in ended] == [2, 0]
    assert "rank 1 has another data than rank 0" in ended[0].err
    (tmp_path / "rank1" / "my.jsonl").unlink()
    ended = together(2, words, tmp_path)
    assert [one.code for one in ended] == [2, 0]
    assert "rank 1: task.data=my.jsonl" in ended[0].err


def as_rank(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Rank 0 of so many, as torchrun says it."""
    for name, value in (("RANK", 0), ("WORLD_SIZE", size), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def settings_of(*words: str) -> Any:
    steps = [] if "method=zero_shot" in words else RUN[5:]
    return check(compose(["task=toy", "model=tiny-opt", "method=mezo", *steps, *words]))


@pytest.mark.parametrize(
    ("words", "size", "message"),
    [
        (["method=adamw"], 2, "method=adamw would exchange whole gradients"),
        (["method=zero_shot"], 2, "method=zero_shot takes no steps"),
        (["query_ranks=2"], 3, "query_ranks=2: the 3 ranks must be a multiple"),
        (["query_ranks=2"], 2, "query_ranks=2: there is 1 query to share; raise method.num_quer"),
        (["query_ranks=2", "method=bf_ssd"], 2, "method=bf_ssd belong together.* leave query_rank"),
        (["query_ranks=3", "method=mezo_svrg"], 3, "there are 2 queries to share"),
        (
            ["query_ranks=4", "method=zo_block", "method.num_blocks=2"],
            4,
            "there are 2 queries to share; raise method.num_queries or method.num_blocks, or lower",
        ),
        (["query_ranks=5", "method=zoro_fa"], 5, "4 queries to share; raise method.num_entries"),
        ([], 9, "batch_size=8: 9 ranks share the rows"),
        (["query_ranks=2", "method.num_queries=2"], 1, "query_ranks=2 is for several ranks"),
        (["+model.device_map=auto"], 2, "model.device_map spreads the model of one process"),
        (["rank_backend=nccl"], 1, "rank_backend=nccl is for several ranks"),
    ],
)
def test_what_ranks_cannot_share_is_refused(
    words: list[str], size: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank(monkeypatch, size)
    monkeypatch.setattr(ranks.Ranks, "__init__", lambda *_: None)  # no others to wait for
    with pytest.raises(UserError, match=message):
        ranks.join(settings_of(*words))


@pytest.mark.parametrize(
    "words",
    [
        ["method=zo_block"],  # layers, which nobody has counted yet
        ["method=zo_block", "method.num_blocks=2"],
        ["method=mezo_svrg"],  # pairs at the weights and at the anchor
        ["method=zoro_fa"],
        ["method=cubic_newton"],
        ["method=mezo", "method.num_queries=2"],
    ],
)
def test_ranks_may_share_what_is_more_than_one_query(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank(monkeypatch, 2)
    monkeypatch.setattr(ranks.Ranks, "__init__", lambda *_: None)  # no others to wait for
    monkeypatch.setattr(ranks.Ranks, "begin", lambda *_: None)
    monkeypatch.setattr(ranks.Ranks, "rank", 0, raising=False)
    monkeypatch.setattr(ranks, "_joined", None)
    assert ranks.join(settings_of("query_ranks=2", *words)) is not None


def test_ranks_that_had_nothing_to_measure_are_said(tmp_path: Path) -> None:
    """Queries grow from epoch to epoch, up to 15; in the first there is one, and a rank waits."""
    words = [*METHODS["mezo"], *RUN, "method=adazeta", "query_ranks=2", "steps=1"]
    ended = together(2, words, tmp_path)
    assert [one.code for one in ended] == [0] * 2, ended[0].err
    assert "query_ranks=2: no step had more than 1 query to share" in ended[0].out


@pytest.mark.parametrize(("size", "of_queries"), [(1, 1), (3, 1), (4, 2), (6, 3), (5, 5)])
def test_shares_are_all_of_it_and_overlap_nowhere(size: int, of_queries: int) -> None:
    settings = replace(settings_of(), query_ranks=of_queries)
    measured = []
    for rank in range(size):
        team = object.__new__(ranks.Ranks)
        team.rank, team.size, team.lost = rank, size, False
        team.begin(settings)
        measured += [(q, r) for q in team.queries(7) for r in range(16)[team.rows(16)]]
    assert sorted(measured) == [(q, r) for q in range(7) for r in range(16)]


def blind() -> None:
    """This machine does not see rank 0's folder."""

    def missing(path: Path) -> None:
        raise UserError(f"{path} cannot be read")

    follower.Saved = missing  # type: ignore[assignment,misc]  # in this process alone


@pytest.fixture(scope="module")
def falling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process whose best weights are not the last."""
    cwd = tmp_path_factory.mktemp("falling")
    words = [*METHODS["mezo"], *RUN, "lr=0.3", "micro_batch_size=4"]
    assert smezo(words, cwd, faults=[few_tokens]).code == 0
    return run_folder(cwd)


@pytest.mark.parametrize("faults", [[], [blind]], ids=["seen", "unseen"])
def test_the_best_weights_are_tested_where_they_are_not_the_last(
    faults: list[Any], falling: Path, tmp_path: Path
) -> None:
    """By all ranks that have them: those of rank 0's folder, or by rank 0 alone."""
    words = [*METHODS["mezo"], *RUN, "lr=0.3"]
    ended = together(2, words, tmp_path, [few_tokens, *faults])
    assert [one.code for one in ended] == [0, 0]
    many, one = result_of(run_folder(tmp_path)), result_of(falling)
    assert one["dev"]["best"]["step"] < one["step"]
    assert many["test"] == one["test"]
    assert many["weights"] == one["weights"]
    assert len(many["rank_peak_memory_bytes"]) == 2


def test_launchers_of_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of their workers would take itself for the rank that started it."""
    as_rank(monkeypatch, 2)
    assert train.main(["--multirun", "hydra/launcher=joblib", "seed=0,1"]) == 2
    assert "hydra/launcher=joblib starts processes of its own" in capsys.readouterr().err


@pytest.mark.parametrize("logger", ["wandb", "tensorboard"])
def test_one_rank_logs(logger: str, tmp_path: Path) -> None:
    """Many ranks, one W&B run or one set of event files, one metrics.jsonl; in rank 0's folder."""
    if importlib.util.find_spec(logger) is None:
        pytest.skip(f"{logger} is not installed")
    words = [*METHODS["mezo"], *RUN, f"logger={logger}"]
    assert [one.code for one in together(2, words, tmp_path)] == [0, 0]
    folder = run_folder(tmp_path)
    pattern = {"wandb": "wandb/offline-run-*", "tensorboard": "**/events.out.tfevents.*"}[logger]
    assert len(list(folder.glob(pattern))) == 1
    assert [r["step"] for r in records_of(folder) if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert not [f for f in (tmp_path / "rank1" / "runs").rglob("*") if f.is_file()]


def test_a_run_that_ended_before_its_test_is_tested_by_ranks(tmp_path: Path) -> None:
    """Followers then have no method yet, and the tested weights are not the last."""
    words = [*METHODS["mezo"], *RUN, "lr=0.3"]
    killed = Fault("evaluate", 6, signal.SIGKILL)  # two prompts, zero-shot, two looks, the test
    assert smezo(words, tmp_path, faults=[few_tokens, killed.install]).code == -signal.SIGKILL
    assert result_of(run_folder(tmp_path))["status"] == "running"
    assert [one.code for one in together(2, words, tmp_path, [few_tokens])] == [0, 0]
    assert smezo(words, tmp_path / "one", faults=[few_tokens]).code == 0
    many, one = (result_of(run_folder(path)) for path in (tmp_path, tmp_path / "one"))
    assert one["dev"]["best"]["step"] < one["step"]
    assert many["test"] == one["test"]

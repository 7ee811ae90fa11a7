"""Runs whose losses come from one batch, or from products beside the weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.method import build_method
from smezo_cli.zo.points import NotBatched
from tests.run.processes import sentence_of, smezo
from tests.run.rank_groups import RUN, together
from tests.run.tiny_runs import records_of, result_of, run_folder

pytestmark = pytest.mark.usefixtures("one_thread")

LOZO = ["model=tiny-llama", "method=lozo", "lr=1e-3", "method.rank=2", "method.num_queries=2"]
KINDS = {
    "choice": ["task=choice", "task.options=[good,bad]", "task.prompt='{text} so'", "task.label=y"],
    "generation": ["task=generation", "task.prompt='{text} so'", "task.answer=good"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "own.jsonl"
    rows = [
        {"text": f"The {'old ' * (k % 3)}film was", "good": "great fun", "bad": "dull", "y": k % 2}
        for k in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measured(words: list[str], executor: str, objective: str = "loss") -> list[Any]:
    words = [*words, f"method.executor={executor}", "device=cpu", "task.num_dev=4"]
    words += ["task.num_test=4", "task.num_train=12"]
    job = Loaded(check(compose(words)), "cpu", lambda _: None)
    opt, rows = build_method(job), job.encode(job.task.train, job.prompts[0])[:6]
    return [opt.step(lambda: job.scorer.objective(rows, objective)) for _ in range(3)]


@pytest.mark.parametrize("executor", ["batched", "side_path"])
@pytest.mark.parametrize("model", ["tiny-opt", "tiny-qwen2", "tiny-gemma3"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_every_kind_of_task_are_those_of_their_own_forwards(
    kind: str, model: str, executor: str, data: Path
) -> None:
    """A loss near 4 in float32 is off by some 1e-6, a difference of two over 2e-2 by 1e-4."""
    words = [*LOZO, *KINDS[kind], f"task.data={data}", f"model={model}", "eps=1e-2"]
    found = [measured(words, how) for how in ("sequential", executor)]
    for a, b in zip(*found, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.projected_grad == pytest.approx(a.projected_grad, abs=5e-3)


def test_answers_that_are_generated_are_no_batch(data: Path) -> None:
    """Each point's answer has a cache of its own, and its next tokens follow from it."""
    words = [*LOZO, *KINDS["generation"], f"task.data={data}", "method.objective=f1"]
    with pytest.raises(NotBatched, match="use executor=sequential"):
        measured(words, "batched", "f1")
    assert measured(words, "side_path", "f1")[0].loss >= 0


@pytest.mark.parametrize("more", [[], ["micro_batch_size=3"]], ids=["whole", "micro-batches"])
def test_a_run_says_how_it_was_measured_and_ends_where_others_do(
    more: list[str], tmp_path: Path
) -> None:
    found = {}
    for executor in ("sequential", "batched", "side_path"):
        words = [*LOZO, *RUN, *more, f"method.executor={executor}"]
        assert smezo(words, tmp_path / executor).code == 0
        folder = run_folder(tmp_path / executor)
        assert result_of(folder)["executor"] == executor
        found[executor] = [x["loss"] for x in records_of(folder) if "loss" in x]
    for executor in ("batched", "side_path"):
        assert found[executor] == pytest.approx(found["sequential"], rel=1e-5)
        assert len(found[executor]) == 6


@pytest.mark.parametrize("executor", ["batched", "side_path"])
def test_ranks_share_the_rows_or_the_queries_of_a_batch(executor: str, tmp_path: Path) -> None:
    words = [*LOZO, *RUN, f"method.executor={executor}"]
    assert smezo(words, tmp_path / "one").code == 0
    one = [x["loss"] for x in records_of(run_folder(tmp_path / "one")) if "loss" in x]
    for name, more in (("rows", []), ("queries", ["query_ranks=2"])):
        ended = together(2, [*words, *more], tmp_path / name)
        assert [rank.code for rank in ended] == [0, 0], ended[0].err
        many = [x["loss"] for x in records_of(run_folder(tmp_path / name)) if "loss" in x]
        assert many == pytest.approx(one, rel=1e-5)


def test_a_run_that_cannot_be_a_batch_ends_in_a_sentence(data: Path, tmp_path: Path) -> None:
    words = [*LOZO, *KINDS["generation"], f"task.data={data}", "method.objective=f1", "steps=2"]
    words += ["task.num_dev=4", "task.num_test=4", "task.num_train=12", "device=cpu"]
    said = sentence_of(smezo([*words, "method.executor=batched", "batch_size=4"], tmp_path))
    assert "executor=batched cannot be used" in said
    assert "executor=sequential" in said

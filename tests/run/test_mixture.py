"""Claims about a run on a mixture: its batches, its loss, and whole runs from the command line."""

import copy
import json
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from smezo_cli.cli.verbs import main
from smezo_cli.methods.first_order import FirstOrder
from smezo_cli.methods.mezo import MeZO
from smezo_cli.run.batches import Batches, MixedBatches, batches_of
from smezo_cli.run.measure import Batch, Measure, ShardedBatch
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.store import notes
from tests.run.processes import Fault, count_batches, smezo
from tests.run.rank_groups import few_tokens, together
from tests.run.test_measure import halves, mezo, setting
from tests.run.tiny_runs import assert_same_run, records_of, result_of, run_folder

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = {"labels": 0.25, "options": 0.75}


# --- batches and losses ----------------------------------------------------------------------


def two_parts(objective: str = "loss") -> tuple[Any, Scorer, list[Any], dict[str, list[Any]]]:
    """A tiny model, its scorer, rows of a classification and of a choice, and these by part."""
    model, scorer, choice = setting("choice", objective)
    _, _, labelled = setting("classification", objective)
    parts = {
        "labels": [replaced(row, "labels") for row in labelled[:5]],
        "options": [replaced(row, "options") for row in choice[:3]],
    }
    return model, scorer, [row for of in parts.values() for row in of], parts


def replaced(row: Any, part: str) -> Any:
    row = copy.copy(row)
    object.__setattr__(row, "part", part)
    return row


@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_a_batch_holds_rows_of_every_part_in_equal_shares(size: int) -> None:
    """Within one row; every part goes through its own rows, each once an epoch."""
    names = ["a"] * 10 + ["b"] * 4
    rows: list[Any] = [type("Row", (), {"part": name, "label": 0})() for name in names]
    batches = batches_of(rows, size, 0, "shuffled")
    assert isinstance(batches, MixedBatches)
    drawn = [batches(step) for step in range(40)]
    for batch in drawn:
        shares = Counter(names[i] for i in batch)
        assert set(shares) == {"a", "b"}
        assert abs(shares["a"] - shares["b"]) <= 1
        assert [names[i] for i in batch] == sorted(names[i] for i in batch)  # part after part
    for name, count in (("a", 10), ("b", 4)):
        in_turn = [i for batch in drawn for i in batch if names[i] == name]
        for start in range(0, len(in_turn) - count, count):
            assert len(set(in_turn[start : start + count])) == count
    assert batches_of(rows, size, 0, "shuffled")(17) == drawn[17]
    assert batches_of(rows, size, 1, "shuffled")(17) != drawn[17]
    assert type(batches_of([type("Row", (), {"part": ""})()], 1, 0, "shuffled")) is Batches


@pytest.mark.parametrize("objective", ["loss", "accuracy"])
def test_the_loss_is_the_weighted_mean_of_the_losses_of_the_parts(objective: str) -> None:
    """Each as alone, whatever the micro-batches: float32 sums, rounded to 2^-32 after that."""
    _, scorer, rows, parts = two_parts(objective)
    alone = {name: scorer.objective(of, objective).detach() for name, of in parts.items()}
    wanted = sum(WEIGHTS[name] * float(loss) for name, loss in alone.items())
    for size in (None, 1, 3):
        found = float(Batch(scorer, rows, objective, size, WEIGHTS)())
        assert found == pytest.approx(wanted, rel=2e-6)
    other = float(Batch(scorer, rows, objective, None, {"labels": 0.5, "options": 0.5})())
    assert other != pytest.approx(wanted, rel=1e-3)  # else weights would not matter here


def test_no_forward_has_rows_of_two_parts() -> None:
    _, scorer, rows, _ = two_parts()
    seen: list[set[str]] = []
    whole = scorer.objective_sum

    def noted(batch: Sequence[Any], name: str = "loss") -> Any:
        seen.append({row.part for row in batch})
        return whole(batch, name)

    scorer.objective_sum = noted  # type: ignore[method-assign]
    Batch(scorer, rows, "loss", 4, WEIGHTS)()
    assert seen == [{"labels"}, {"labels"}, {"options"}]


def test_a_gradient_is_the_weighted_sum_of_those_of_the_parts() -> None:
    """For first-order methods; float32 sums in another order."""
    gradients = {}
    for name in ("both", "labels", "options"):
        model, scorer, rows, parts = two_parts()
        method = FirstOrder(model, optimizer=lambda ps: torch.optim.SGD(ps, lr=1.0))
        before = copy.deepcopy(method.trained)
        weights = WEIGHTS if name == "both" else None
        measure = Measure(scorer, "loss", None, None, halves()[1], weights=weights)
        measure.step(method, rows if name == "both" else parts[name])
        moved = [before[key] - p for key, p in method.trained.items()]
        gradients[name] = torch.cat([m.detach().view(-1) for m in moved])
    wanted = sum(WEIGHTS[name] * gradients[name] for name in WEIGHTS)
    assert isinstance(wanted, torch.Tensor)
    largest = float(wanted.abs().max())
    assert torch.allclose(gradients["both"], wanted, rtol=0, atol=2e-5 * largest)


class Pair:
    """Two ranks that share the rows; each is asked in turn, and what it measured is added up."""

    shares_rows = True

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def rows(self, num: int) -> slice:
        return slice(self.rank * num // 2, (self.rank + 1) * num // 2)

    def queries(self, num: int) -> Sequence[int]:
        return range(num)

    def add(self, numbers: Sequence[float]) -> list[float]:
        return list(numbers)

    def step_made(self) -> None:
        pass


def test_what_ranks_measure_adds_up_to_the_loss_of_one_process() -> None:
    """To the bit for the same micro-batches: rank 0 has labels alone, rank 1 of both parts."""
    _, scorer, rows, _ = two_parts()
    shards = [ShardedBatch(scorer, rows, "loss", 1, Pair(rank), WEIGHTS) for rank in range(2)]
    assert sum(float(shard()) for shard in shards) == float(
        Batch(scorer, rows, "loss", 1, WEIGHTS)()
    )


def test_the_gradients_of_ranks_add_up_to_that_of_one_process() -> None:
    """Float32 sums in another order, as of micro-batches."""
    gradients = []
    model, scorer, rows, _ = two_parts()
    whole = Batch(scorer, rows, "loss", 1, WEIGHTS)
    shards = [ShardedBatch(scorer, rows, "loss", None, Pair(rank), WEIGHTS) for rank in range(2)]
    for batches in ([whole], shards):
        model.zero_grad()
        for part in (part for batch in batches for part in batch.parts()):
            part().backward()  # type: ignore[no-untyped-call]  # untyped in torch
        of_all = [p.grad for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat([g.view(-1) for g in of_all]))
    largest = float(gradients[0].abs().max())
    assert torch.allclose(gradients[0], gradients[1], rtol=0, atol=2e-5 * largest)
    assert largest > 0


def test_micro_batches_are_halved_where_memory_is_too_small() -> None:
    """A step in parts of one row is the step of the whole: 2e-6 of a loss of 4, over 2 eps."""
    found = []
    for size in (None, 1):
        model, scorer, rows, _ = two_parts()
        opt: MeZO = mezo(model, executor="sequential")  # type: ignore[assignment]
        measure = Measure(scorer, "loss", size, None, halves()[1], weights=WEIGHTS)
        found.append(measure.step(opt, rows).projected_grad[0])
    assert found[0] == pytest.approx(found[1], abs=2e-6 * 4 / 2e-2)
    assert abs(found[0]) > 1e-2


# --- whole runs ------------------------------------------------------------------------------


def parts_word(folder: Path) -> str:
    """task.parts with the toy task and own rows of two options each."""
    rows = [
        {"question": f"word {i}", "a": f"great {i % 5}", "b": f"terrible {i % 3}", "label": i % 2}
        for i in range(60)
    ]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = f"{{task: choice, data: {file}, prompt: '{{question}} is', options: [a, b]}}"
    return f"task.parts=[toy,{own}]"


COUNTS = ["task.num_train=16", "task.num_dev=8", "task.num_test=10", "device=cpu"]
MEZO = ["model=tiny-llama", "method=mezo", "lr=1e-3", "method.executor=sequential"]
STEPS = ["steps=6", "eval_every=3", "batch_size=5"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The words of a run on a mixture that was never stopped, and its folder."""
    folder = tmp_path_factory.mktemp("mixture")
    words = ["task=mixture", parts_word(folder), *COUNTS, *MEZO, *STEPS, "task.weights=[1,3]"]
    ended = smezo(words, folder)
    assert ended.code == 0, ended.err
    return words, run_folder(folder)


def test_each_part_is_chosen_a_prompt_and_scored_as_a_task_of_its_own(
    finished: tuple[list[str], Path], tmp_path: Path
) -> None:
    """Zero-shot: to the bit what a run of the part alone has; the mixture's is their mean."""
    words, folder = finished
    result, whole = result_of(folder), result_of(folder)["zero_shot"]
    alone = {}
    own = Path(words[1].partition("data: ")[2].partition(",")[0])
    tasks = {
        "toy": ["task=toy"],
        "pairs": ["task=choice", f"task.data={own}", "task.prompt='{question} is'"],
    }
    for name, task in tasks.items():
        more = ["task.options=[a,b]"] if name == "pairs" else []
        line = [*task, *more, *COUNTS, "model=tiny-llama", "method=zero_shot"]
        assert smezo(line, tmp_path / name).code == 0
        alone[name] = result_of(run_folder(tmp_path / name))
    assert whole["parts"] == {name: of["zero_shot"] for name, of in alone.items()}
    scores = [of["zero_shot"]["accuracy"] for of in alone.values()]
    assert whole["accuracy"] == pytest.approx(sum(scores) / 2)
    without = [{k: v for k, v in note.items() if k != "part"} for note in result["prompt"]]
    assert without == [of["prompt"] for of in alone.values()]
    assert [note["part"] for note in result["prompt"]] == ["toy", "pairs"]
    calibrated = result["zero_shot_calibrated"]["parts"]
    assert calibrated["toy"] == alone["toy"]["zero_shot_calibrated"]


def test_dev_and_test_are_reported_by_part_and_as_the_mean(
    finished: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = finished
    result, looks = result_of(folder), [r for r in records_of(folder) if "dev.loss" in r]
    assert len(looks) == 2
    for look in looks:
        toy, pairs = look["dev.toy.loss"], look["dev.pairs.loss"]
        assert look["dev.loss"] == pytest.approx(0.25 * toy + 0.75 * pairs)
        both = look["dev.toy.accuracy"] + look["dev.pairs.accuracy"]
        assert look["dev.accuracy"] == pytest.approx(both / 2)
    best = min(looks, key=lambda look: look["dev.loss"])
    assert result["dev"]["best"]["step"] == best["step"]
    assert result["dev"]["best"]["parts"]["pairs"]["loss"] == best["dev.pairs.loss"]
    by_part = {name: of["accuracy"] for name, of in result["test"]["parts"].items()}
    assert list(by_part) == ["toy", "pairs"]
    log = (folder / "console.log").read_text()
    assert f"  toy {by_part['toy']:.4f} (loss " in log
    runs = str(folder.parent.parent)
    assert main(["runs", "--runs-dir", runs, "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["parts"] == by_part
    assert record["score"] == result["test"]["accuracy"]
    assert main(["runs", "--runs-dir", runs, "test.parts.toy.n=10"]) == 0
    assert f"toy {by_part['toy']:.4f}, pairs {by_part['pairs']:.4f}" in capsys.readouterr().out
    assert main(["runs", "--runs-dir", runs, "--mean", "--json"]) == 0
    (mean,) = json.loads(capsys.readouterr().out)
    gain = result["test"]["over_zero_shot"]
    assert mean["over_zero_shot"] == pytest.approx(gain["gain"])
    assert mean["over_zero_shot_se"] == pytest.approx(gain["standard_error"])


def test_verbs_on_a_finished_run_know_its_parts(
    finished: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = finished
    out = tmp_path / "predictions.jsonl"
    assert main(["eval", str(folder), "--out", str(out)]) == 0
    assert out.read_text().count('"part": "pairs"') == 10
    assert out.read_text() == (folder / "predictions-test.jsonl").read_text()
    assert main(["replay", str(folder)]) == 0  # 1 where weights or metrics differ
    delta = tmp_path / "run.delta"
    assert main(["export", str(folder), str(delta), "--delta"]) == 0
    assert main(["replay", str(delta), "--split", "dev"]) == 0
    capsys.readouterr()
    field = ["--field", "text=the plot was dull and fresh"]
    assert main(["predict", str(folder), "--part", "toy", *field]) == 0
    assert json.loads(capsys.readouterr().out)["word"] in ("terrible", "great")
    for key in ("task.weights=[1,1]", "task.nodes={}", "task.nodes.toy.prompt=1"):
        assert main(["eval", str(folder), key, "--out", str(out)]) == 2
        assert "a trained run keeps this setting" in capsys.readouterr().err
    assert main(["eval", str(folder), "task.num_test=3", "--out", str(out)]) == 0
    assert "(n=6, step" in capsys.readouterr().out
    for more, says in (([], "by --part toy"), (["--part", "rte"], "has no part rte")):
        assert main(["predict", str(folder), *more, *field]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "fault",
    [
        Fault("evaluate", 5, signal.SIGKILL),  # in an evaluation of dev during the training
        Fault("rename", 9, signal.SIGKILL),
    ],
    ids=["in an evaluation", "while saving"],
)
def test_a_run_that_is_killed_goes_on_with_the_same_bits(
    fault: Fault, finished: tuple[list[str], Path], tmp_path: Path
) -> None:
    words, folder = finished
    assert smezo(words, tmp_path, faults=[fault.install]).code == -signal.SIGKILL
    ended = smezo(words, tmp_path)
    assert ended.code == 0, ended.err
    assert_same_run(run_folder(tmp_path), folder)


def test_a_run_that_is_stopped_in_an_evaluation_scores_no_row_of_a_part_twice(
    finished: tuple[list[str], Path], tmp_path: Path
) -> None:
    """A few rows are scored at a time, so that there is a stop inside a part; bit for bit again."""
    words, whole, halved = finished[0], tmp_path / "whole", tmp_path / "halved"
    assert smezo(words, whole, faults=[count_batches]).code == 0
    batches = (whole / "batches").read_text().splitlines()
    for number in (3, len(batches) - 1):  # of the first part's dev; of the second part's test
        stop = partial(count_batches, number, signal.SIGTERM)
        assert smezo(words, halved / str(number), faults=[stop]).code == 130
        assert smezo(words, halved / str(number), faults=[count_batches]).code == 0
        assert_same_run(run_folder(halved / str(number)), run_folder(whole))
        assert (halved / str(number) / "batches").read_text().splitlines() == batches


@pytest.mark.parametrize("more", [[], ["method=forward_grad"], ["method=mazo"]])
def test_two_ranks_train_the_weights_of_one_process(
    more: list[str], finished: tuple[list[str], Path], tmp_path: Path
) -> None:
    """For the same micro-batches: of one row here."""
    words = [*finished[0], "micro_batch_size=1", *more]
    ended = together(2, words, tmp_path / "many", [few_tokens])
    assert [one.code for one in ended] == [0, 0], ended[0].err
    assert smezo(words, tmp_path / "one", faults=[few_tokens]).code == 0
    many, one = run_folder(tmp_path / "many"), run_folder(tmp_path / "one")
    assert result_of(many)["weights"] == result_of(one)["weights"]
    assert records_of(many) == records_of(one)
    assert result_of(many)["test"] == result_of(one)["test"]


def test_demonstrations_before_a_row_are_of_its_own_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["task=mixture", parts_word(tmp_path), *COUNTS, "model=tiny-llama", "method=icl"]
    assert main(["train", *words, "method.num_demonstrations=2"]) == 0
    folder = run_folder(tmp_path)
    result = result_of(folder)
    for name, of in result["demonstrations"].items():
        assert of["used"] == 2
        assert all(row.startswith(f"{name}/") for row in of["rows"])
    assert list(result["demonstrations"]) == ["toy", "pairs"]
    assert main(["eval", str(folder)]) == 0  # behind the same demonstrations
    assert f"test accuracy {result['test']['accuracy']:.4f}" in capsys.readouterr().out


def test_a_plan_is_that_of_the_part_that_needs_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*MEZO, "steps=10", "device=cpu", "eval_every=5", "--json"]

    def planned(*words: str) -> Any:
        assert main(["plan", *words, *line]) == 0
        return json.loads(capsys.readouterr().out)

    both = planned("task=mixture", parts_word(tmp_path), "batch_size=8")
    own = f"task.data={tmp_path}/pairs.jsonl"
    choice = ["task=choice", own, "task.prompt='{question} is'", "task.options=[a,b]"]
    each = [planned(*task, "batch_size=4") for task in (["task=toy"], choice)]
    for name in ("step", "evaluation"):
        assert both["phases"][name] == max(of["phases"][name] for of in each)
    assert both["work"]["forwards of training"] == each[0]["work"]["forwards of training"] == 20
    assert both["work"]["rows in them"] == 20 * 8


def test_a_delta_whose_prompts_are_of_other_parts_is_refused_in_a_sentence(
    finished: tuple[list[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As somebody could write one: no part, a part twice, one part alone."""
    delta, real = tmp_path / "run.delta", notes.chosen_prompts
    changes: list[Callable[[Any], Any]] = [
        lambda of: [{k: v for k, v in note.items() if k != "part"} for note in of],
        lambda of: [of[0], of[0]],
        lambda of: of[1:],
    ]
    for change in changes:
        with monkeypatch.context() as patch:
            patch.setattr(notes, "noted_prompt", lambda of, do=change: do(real(of)))
            assert main(["export", str(finished[1]), str(delta), "--delta"]) == 0
        capsys.readouterr()
        assert main(["replay", str(delta)]) == 2
        err = capsys.readouterr().err
        assert "does not fit the rows of mixture" in err
        assert err.count("\n") == 1
        delta.unlink()

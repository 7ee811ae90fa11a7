"""`smezo runs`: the table says what the run folders say, and gains are paired."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from smezo_cli.cli.verbs import main
from smezo_cli.errors import UserError
from smezo_cli.report import runs

Rows = list[float]


def make(
    root: Path,
    name: str,
    rows: Rows | None = None,
    *,
    zero: Rows | None = None,
    test_rows: str = "aa",
    train_rows: str | None = None,
    status: str = "done",
    **settings: Any,
) -> Path:
    """A run folder as training leaves it."""
    folder = root / "default" / name
    folder.mkdir(parents=True)
    config = {
        "seed": 0,
        "lr": 1e-4,
        "steps": 10,
        "lr_schedule": "constant",
        "task": {"name": "toy"},
    }
    config |= settings
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    rows = [1.0, 0.0] if rows is None else rows
    zero = [0.0] * len(rows) if zero is None else zero
    result = {
        "status": status,
        "task": "toy",
        "model": "tiny-llama",
        "method": settings.get("method", "mezo"),
        "metric": "accuracy",
        "lr": config["lr"],
        "sparsity": {"requested": None},
        "seed": config["seed"],
        "steps": config["steps"],
        "step": config["steps"],
        "test": {"accuracy": sum(rows) / len(rows), "auc": 0.5} if status == "done" else None,
        "zero_shot": {"accuracy": sum(zero) / len(zero)},
        "test_rows": test_rows,
        "train_rows": train_rows,
        "train_seconds": 2.0,
        "peak_memory_bytes": 2**30,
    }
    (folder / "result.json").write_text(json.dumps(result))
    outcomes = {"outcome.test": rows, "outcome.zero_shot": zero, "outcome.calibrated": zero}
    save_file(
        {key: np.array(value, dtype=np.float32) for key, value in outcomes.items()},
        folder / "scores.safetensors",
    )
    return folder


def table(capsys: pytest.CaptureFixture[str], root: Path, *words: str) -> list[dict[str, Any]]:
    assert main(["runs", "--runs-dir", str(root), "--json", *words]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_every_run_is_listed_and_what_is_no_run_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "a")
    make(tmp_path, "b", status="running")
    (tmp_path / "default" / "c").mkdir()
    (tmp_path / "default" / "c" / "result.json").write_text("{")
    rows = table(capsys, tmp_path)
    assert [Path(row["run"]).name for row in rows] == ["a", "b"]
    assert [row["score"] for row in rows] == [0.5, None]
    assert main(["runs", "--runs-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "running" in text
    assert "default/b" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lr=1e-4"], ["a", "b"]),
        (["lr=0.0001", "seed=1"], ["b"]),
        (["seed=0,1"], ["a", "b", "c"]),
        (["status=failed"], ["c"]),
        (["score=0.5", "status=done"], ["a", "b"]),
        (["seed=7"], []),
        (["--sort", "lr"], ["c", "a", "b"]),
    ],
)
def test_filters_compare_numbers_as_numbers_and_words_as_words(
    words: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "a")
    make(tmp_path, "b", seed=1)
    make(tmp_path, "c", lr=1e-5, status="failed")
    assert [Path(row["run"]).name for row in table(capsys, tmp_path, *words)] == expected


def test_runs_that_differ_in_their_seed_alone_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "a0", [1, 1, 0, 0], seed=0)
    make(tmp_path, "a1", [1, 1, 1, 0], seed=1)
    make(tmp_path, "b0", [1, 0, 0, 0], lr=3e-4)
    make(tmp_path, "b1", status="running", lr=3e-4, seed=1)
    first, second = table(capsys, tmp_path, "--mean")
    assert (first["seeds"], second["seeds"]) == (2, 1)
    assert first["score"] == pytest.approx((0.5 + 0.75) / 2)
    assert first["sd"] == pytest.approx(0.25 / math.sqrt(2))
    assert second["sd"] is None


def test_a_seed_that_was_run_twice_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluated as often by eval_every=null and by its number: other folders, the same settings."""
    for name, every in (("a", None), ("b", 1)):
        folder = make(tmp_path, name, [1, 1, 0, 0], eval_every=every)
        dev_at(folder, 1, 2)
    make(tmp_path, "c", [1, 1, 1, 1], seed=1, eval_every=1)
    (record,) = table(capsys, tmp_path, "--mean")
    assert record["seeds"] == 2
    assert record["score"] == pytest.approx(0.75)
    assert main(["runs", "--runs-dir", str(tmp_path), "--mean"]) == 0
    assert "b repeats seed 0 and is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        *[("score", [2, 1]), ("sd", [2, 1]), ("lr", [1, 2]), ("train_seconds", [1, 2])],
        ("test.accuracy", [2, 1]),
    ],
)
def test_groups_are_sorted_by_their_own_numbers(
    key: str, expected: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by those of one of their runs: the first has the worst seed, and the better mean."""
    make(tmp_path, "a0", [1, 0, 0, 0], seed=0)
    make(tmp_path, "a1", [1, 1, 1, 1], seed=1)
    for seed in (0, 1):
        make(tmp_path, f"b{seed}", [1, 1, 0, 0], lr=3e-4, seed=seed)
    found = table(capsys, tmp_path, "--mean", "--sort", key)
    assert [1 if "lr=0.0001" in record["runs"] else 2 for record in found] == expected
    assert found[0]["over_first"] is None


def test_a_column_that_the_first_group_lacks_is_there_for_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path, "a")
    save_file({"outcome.test": np.ones(2, np.float32)}, folder / "scores.safetensors")
    make(tmp_path, "b", lr=3e-4)
    first, second = table(capsys, tmp_path, "--mean")
    assert first["over_zero_shot"] is None
    assert second["over_zero_shot"] == 0.5
    assert main(["runs", "--runs-dir", str(tmp_path), "--mean"]) == 0
    assert "over_zero_shot" in capsys.readouterr().out


def test_settings_with_brackets_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, prompt in (("a", "[INST] {text} [/INST]"), ("b", ":smile: [bold]")):
        make(tmp_path, name, task={"name": "toy", "prompt": prompt})
    assert main(["runs", "--runs-dir", str(tmp_path), "--mean"]) == 0
    out = capsys.readouterr().out
    assert "[/INST]" in out
    assert ":smile: [bold]" in out


def test_seeds_that_draw_their_training_rows_are_one_line_where_the_test_rows_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """k-shot splits (data_seed=${seed}); a seed on the rows of another draw is none of them."""
    make(tmp_path, "other", [1, 1, 1, 1], lr=3e-4)
    make(tmp_path, "k13", [1, 1, 0, 0], seed=13, data_seed=13, train_rows="t13")
    make(tmp_path, "k21", [1, 0, 0, 0], seed=21, data_seed=21, train_rows="t21")
    make(tmp_path, "k42", [1, 0, 0, 0], seed=42, data_seed=42, train_rows="t42", test_rows="bb")
    assert sorted(row["seeds"] for row in table(capsys, tmp_path, "--mean")) == [1, 1, 2]
    make(tmp_path, "k87", [1, 0, 0, 0], seed=87, data_seed=21, train_rows="t21")
    assert sorted(row["seeds"] for row in table(capsys, tmp_path, "--mean")) == [1, 1, 1, 2]
    # One draw for several seeds: as ever.
    make(tmp_path, "k88", [1, 0, 0, 0], seed=88, data_seed=21, train_rows="t21")
    assert sorted(row["seeds"] for row in table(capsys, tmp_path, "--mean")) == [1, 1, 1, 3]


def test_the_gain_of_several_seeds_is_over_the_zero_shot_outcomes_of_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of its own let a seed choose a prompt of its own; nothing was gained by either."""
    make(tmp_path, "a", [1, 1, 0, 0], zero=[1, 1, 0, 0], seed=13, data_seed=13, train_rows="a")
    make(tmp_path, "b", [1, 1, 1, 0], zero=[1, 1, 1, 0], seed=21, data_seed=21, train_rows="b")
    (row,) = table(capsys, tmp_path, "--mean")
    assert (row["over_zero_shot"], row["over_zero_shot_se"]) == (0, 0)


def test_gains_are_differences_row_by_row_with_the_error_of_their_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs right on the same rows differ by nothing, surely; on other rows, unsurely."""
    make(tmp_path, "first", [1, 1, 0, 0], zero=[1, 0, 0, 0])
    make(tmp_path, "same", [1, 1, 0, 0], lr=1)
    make(tmp_path, "other", [0, 0, 1, 1], lr=2)
    rows = table(capsys, tmp_path, "--compare", "first", "same", "other")
    assert rows[0]["over_zero_shot"] == 0.25
    assert rows[0]["over_zero_shot_se"] == pytest.approx(np.std([0, 1, 0, 0]) / 2)
    assert rows[0]["over_first"] is None
    assert (rows[1]["over_first"], rows[1]["over_first_se"]) == (0, 0)
    assert rows[2]["over_first"] == 0
    assert rows[2]["over_first_se"] == pytest.approx(np.std([-1, -1, 1, 1]) / 2)


def test_runs_on_other_rows_are_not_subtracted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "a")
    make(tmp_path, "b", test_rows="bb")
    assert table(capsys, tmp_path, "--compare", "a", "b")[1]["over_first"] is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tsak=rte"], ["no run has a key tsak", "did you mean task"]),
        (["rte"], ["'rte' is not of the form KEY=VALUE"]),
        (["--sort", "lrr"], ["--sort lrr", "did you mean lr"]),
        (["--compare", "a"], ["two runs or more"]),
        (["--compare", "a", "zz"], ["zz is no run", "there are: a, b1, b2, c"]),
        (["--compare", "a", "b"], ["b fits 2 runs", "b1, b2"]),
        (["--compare", "a", "c"], ["not finished: running"]),
        (["--compare", "a", "b1", "--sort", "lr"], ["--sort has no effect"]),
        (["--mean", "--compare", "a", "b1"], ["exclude each other"]),
        (["--meen"], ["unrecognized arguments: --meen", "smezo runs --help"]),
        (["--runs-dir", "nowhere"], ["--runs-dir nowhere", "no such folder"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_is_one_sentence(
    words: list[str], says: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, status in (("a", "done"), ("b1", "done"), ("b2", "done"), ("c", "running")):
        make(tmp_path, name, status=status)
    assert main(["runs", "--runs-dir", str(tmp_path), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    for part in says:
        assert part in err


def test_a_run_without_outcomes_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path, "a")
    run = runs.load(folder)
    assert run is not None
    (folder / "scores.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"scores\.safetensors cannot be read"):
        run.outcomes()
    save_file({"x": np.zeros(1)}, folder / "scores.safetensors")
    with pytest.raises(UserError, match="older version"):
        run.outcomes()


@pytest.mark.parametrize("zero", [[0.0], [0.0] * 3, []])
def test_outcomes_that_do_not_fit_each_other_are_damage(tmp_path: Path, zero: Rows) -> None:
    run = make(tmp_path, "a", [1.0, 0.0], zero=zero or [0.0])
    if not zero:
        flat = np.zeros((0, 7))
        save_file({"outcome.test": flat, "outcome.zero_shot": flat}, run / "scores.safetensors")
    with pytest.raises(UserError, match=r"scores\.safetensors is damaged: give the command"):
        runs.load(run).outcomes()  # type: ignore[union-attr]  # it is a run


def test_seeds_with_other_numbers_of_rows_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "a", [1.0, 0.0])
    make(tmp_path, "b", [1.0], seed=1)
    assert main(["runs", "--mean", "--runs-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "outcomes of 1 test rows and" in said
    assert said.count("\n") == 1


def test_no_runs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--runs-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"


@pytest.mark.parametrize("sparsity", [{"requested": "0.5"}, {"realised": [0.5]}, 0.5, "0.5"])
def test_a_result_whose_sparsity_is_no_number_is_passed_over(
    tmp_path: Path, sparsity: object
) -> None:
    """Figures compute with it."""
    make(tmp_path, "good")
    folder = make(tmp_path, "bad")
    result = json.loads((folder / "result.json").read_text()) | {"sparsity": sparsity}
    (folder / "result.json").write_text(json.dumps(result))
    assert [run.path.name for run in runs.find(tmp_path)] == ["good"]


def dev_at(folder: Path, *steps: int) -> None:
    """Give a run evaluations on dev after these steps."""
    lines = [{"step": step, "dev.accuracy": 0.5} for step in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs_that_were_evaluated_at_other_steps_are_no_seeds_of_one_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What eval_every=null stood for counts: as result.json has it, or as dev was evaluated."""
    made = {
        "before": make(tmp_path, "before", seed=0, steps=100, eval_every=None),
        "same": make(tmp_path, "same", seed=1, steps=100, eval_every=None),
        "now": make(tmp_path, "now", seed=2, steps=100, eval_every=None),
        "asked": make(tmp_path, "asked", seed=3, steps=100, eval_every=10),
        "unknown": make(tmp_path, "unknown", seed=4, steps=100, eval_every=None),
    }
    dev_at(made["before"], 10, 20, 30)
    dev_at(made["same"], 0, 10, 20)
    file = made["now"] / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eval_every": 20}))
    found = [{run.path.name for run in group.runs} for group in runs.groups(runs.find(tmp_path))]
    assert sorted(found, key=len) == [{"now", "unknown"}, {"asked", "before", "same"}]
    labels = {run.path.name: run.settings["eval_every"] for run in runs.find(tmp_path)}
    assert labels == {"before": 10, "same": 10, "now": 20, "asked": 10, "unknown": 20}
    capsys.readouterr()
    assert main(["runs", "--mean", "--json", "--runs-dir", str(tmp_path)]) == 0
    ends = [record["runs"].rpartition(" ")[2] for record in json.loads(capsys.readouterr().out)]
    assert ends == ["eval_every=10", "eval_every=20"]


def test_runs_of_other_weights_behind_one_name_are_no_seeds_of_one_group(tmp_path: Path) -> None:
    for seed, weights in enumerate(("a", "a", "b")):
        file = make(tmp_path, f"r{seed}", seed=seed) / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_fingerprint": weights}))
    assert [len(group.runs) for group in runs.groups(runs.find(tmp_path))] == [2, 1]

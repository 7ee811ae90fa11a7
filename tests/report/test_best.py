"""`smezo runs --best`, and its tables on terminals of any width."""

import json
import os
import pty
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from smezo_cli.cli import completion, fitted_table
from smezo_cli.cli.verbs import VERBS, main
from tests.report.test_runs import make, table


def ended(root: Path, name: str, loss: float, rows: list[float], **settings: Any) -> Path:
    """A finished run that came to `loss` on dev; rows are of test."""
    folder = make(root, name, rows, **settings)
    file = folder / "result.json"
    best = {"step": 5, "loss": loss, "accuracy": settings.get("accuracy", 0.5)}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dev": {"best": best}}))
    return folder


GOOD, BAD = [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]


def test_the_best_is_the_lowest_mean_dev_loss_over_seeds_whatever_the_test_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One lucky seed of other settings has a lower loss than each of the best; it is one of two."""
    ended(tmp_path, "a0", 0.5, BAD, lr=1e-4)
    ended(tmp_path, "a1", 0.5, GOOD, lr=1e-4, seed=1)
    ended(tmp_path, "b0", 0.4, GOOD, lr=1e-3)
    ended(tmp_path, "b1", 0.7, GOOD, lr=1e-3, seed=1)
    ended(tmp_path, "c0", 0.6, GOOD, lr=1e-5)
    ended(tmp_path, "d0", 0.1, GOOD, lr=1e-2, status="failed")
    make(tmp_path, "e0", GOOD, lr=1e-1)  # of a version that kept no evaluation
    (row,) = table(capsys, tmp_path, "--best")
    assert (row["best"], row["settings"]) == ("toy-tiny-llama-mezo", {"lr": 1e-4})
    assert (row["seeds"], row["compared"]) == (2, 3)
    assert (row["dev_loss"], row["dev_loss_sd"], row["score"]) == (0.5, 0, 0.5)
    assert row["sd"] == pytest.approx(0.5 / 2**0.5)
    assert [Path(run).name for run in row["runs"]] == ["a0", "a1"]


def test_settings_with_a_seed_that_diverged_come_last_and_seeds_without_a_result_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where each seed draws its rows; the seeds that are left out would have won."""
    for own in (False, True):
        root = tmp_path / str(own)
        one = {"seed": 1, "data_seed": int(own)}
        ended(root, "a0", 0.2, GOOD, lr=1e-3, data_seed=0)
        make(root, "a1", GOOD, lr=1e-3, status="diverged", **one)
        ended(root, "b0", 0.5, GOOD, lr=1e-4, data_seed=0)
        make(root, "b1", GOOD, lr=1e-4, status="failed", **one)
        ended(root, "c0", 0.6, GOOD, lr=1e-5, data_seed=0)
        ended(root, "c1", 0.6, GOOD, lr=1e-5, **one)
        (row,) = table(capsys, root, "--best")
        assert (row["settings"], row["compared"], row["seeds"]) == ({"lr": 1e-4}, 3, 1)
        assert (row["diverged"], row["missing"]) == ([], [1])
        assert "1 of 2 seeds: seed 1 has no result" in row["note"]
        assert "the settings compared have 1 to 2 seeds" in row["note"]
        (row,) = table(capsys, root, "--best", "lr=1e-3")
        assert (row["seeds"], row["diverged"]) == (1, [1])
        assert row["note"] == "1 of 2 seeds: seed 1 diverged"
        assert main(["runs", "--runs-dir", str(root), "--best"]) == 0
        assert "1 of 2 seeds" in capsys.readouterr().out
        (row,) = table(capsys, root, "--best", "lr=1e-5")
        assert (row["seeds"], row["note"]) == (2, None)


def test_equal_settings_under_two_names_are_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each seed counts once, in whichever folders it is."""
    ended(tmp_path / "search", "a0", 0.5, GOOD)
    ended(tmp_path / "again", "a0", 0.5, GOOD)
    ended(tmp_path / "again", "a1", 0.7, GOOD, seed=1)
    (row,) = table(capsys, tmp_path, "--best")
    assert (row["compared"], row["seeds"], row["dev_loss"]) == (1, 2, pytest.approx(0.6))


def test_a_dev_metric_that_is_not_there_is_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ended(tmp_path, "a0", 0.5, GOOD) / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dev": {"best": {"loss": 0.5}}}))
    (row,) = table(capsys, tmp_path, "--best")
    assert (row["dev_loss"], row["dev_metric"]) == (0.5, None)
    assert main(["runs", "--runs-dir", str(tmp_path), "--best"]) == 0
    assert "nan" not in capsys.readouterr().out


def test_by_metric_takes_the_highest_of_dev(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(tmp_path, "a", 0.5, GOOD, lr=1e-4, accuracy=0.6)
    ended(tmp_path, "b", 0.6, BAD, lr=1e-3, accuracy=0.7)
    by_loss, by_metric = (
        table(capsys, tmp_path, "--best", *by)[0]["settings"] for by in ([], ["--by", "metric"])
    )
    assert (by_loss["lr"], by_metric["lr"]) == (1e-4, 1e-3)


def test_each_method_has_its_best_and_the_settings_are_those_that_differ_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = {"name": "mezo", "lr": 1e-4, "num_queries": 1}
    ended(tmp_path, "a", 0.5, GOOD, lr=1e-4, method=of)
    ended(tmp_path, "b", 0.4, GOOD, lr=1e-4, method=of | {"num_queries": 2}, compile=True)
    ended(tmp_path, "c", 0.6, GOOD, lr=1e-3, method="adamw")
    for folder in ("a", "b"):
        file = tmp_path / "default" / folder / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"method": "mezo"}))
    mezo, adamw = table(capsys, tmp_path, "--best")
    assert mezo["settings"] == {"method.num_queries": 2}
    assert adamw["settings"] == {"lr": 1e-3, "steps": 10}
    assert table(capsys, tmp_path, "--best", "method=adamw") == [adamw]


@pytest.mark.parametrize(
    "other", [{"data_seed": 1}, {"task": {"name": "toy", "num_dev": 8}}, {"test_rows": "bb"}]
)
def test_losses_of_other_rows_are_not_compared(
    other: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(tmp_path, "a", 0.5, GOOD, lr=1e-4)
    ended(tmp_path, "b", 0.4, GOOD, lr=1e-3, **other)
    assert [row["compared"] for row in table(capsys, tmp_path, "--best")] == [1, 1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--best", "--mean"], "--mean and --best exclude each other"),
        (["--best", "--sort", "lr"], "--sort has no effect with --best"),
        (["--by", "loss"], "--by loss goes with --best"),
        (["--best", "--by", "test"], "invalid choice: 'test'"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "--runs-dir", str(tmp_path), *words]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_completion_knows_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for line, words in (("smezo runs --b", "--best \n--by \n"), ("smezo runs --by m", "metric \n")):
        assert completion.main(["query", line], VERBS) == 0
        assert capsys.readouterr().out == words


# --- the width of tables ---------------------------------------------------------------------


@contextmanager
def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Write what is printed to a terminal of so many columns; gives what reads it."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w") as out, os.fdopen(ours, "rb", buffering=0) as shown:
        monkeypatch.setattr(sys, "stdout", out)

        def read() -> str:
            out.flush()
            found = b""
            while select.select([shown], [], [], 0.1)[0]:
                found += shown.read(1 << 16)
            return found.decode()

        yield read


@pytest.mark.parametrize("columns", [200, 120, 90, 60, 40])
def test_a_terminal_shows_no_line_that_is_wider_and_names_what_it_leaves_out(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole names, if on several lines; every column is shown or named."""
    monkeypatch.setenv("TERM", "dumb")  # no colours
    monkeypatch.chdir(tmp_path)
    name = "rotten_tomatoes-smollm2-135m-sparse_mezo-s0-0123abcd"
    ended(Path("runs"), name, 0.5, GOOD)
    with terminal(columns, monkeypatch) as read:
        assert main(["runs"]) == 0
        *lines, last = read().replace("\r\n", "\n").rstrip("\n").split("\n")
    shown = [*lines, last] if columns >= 180 else lines
    assert all(len(line) <= columns for line in shown)
    assert "…" not in "".join(shown)
    head = next(line for line in lines if "status" in line)
    told = "" if columns >= 180 else last
    for key in ("run", "status", "steps", "lr", "seed", "metric", "score", "train_seconds"):
        assert (key in head.split()) != (key in told.replace(",", "").split()), key
    whole = "".join(line.split("  ")[0].strip() for line in lines if "─" not in line)
    assert f"runs/default/{name}" in whole or name in "".join(lines)


def test_a_column_that_was_sorted_by_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"run": "r" * 30, "score": 0.5, "peak_GiB": 1.0, "train_seconds": 2.0}]
    monkeypatch.setattr(fitted_table, "terminal_width", lambda: 60)
    for needed, left in (("peak_GiB", "train_seconds"), (None, "peak_GiB")):
        with monkeypatch.context() as patch, open(tmp_path / "out", "w") as file:
            patch.setattr(sys, "stdout", file)
            fitted_table.show(records, needed)
        assert f"columns: {left} (" in (tmp_path / "out").read_text()


def test_a_pipe_gets_every_column_and_whole_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long they are."""
    monkeypatch.setenv("COLUMNS", "40")
    deep = tmp_path / ("d" * 200) / ("e" * 200)
    folder = ended(deep, "a", 0.5, GOOD)
    assert main(["runs", "--runs-dir", str(deep)]) == 0
    out = capsys.readouterr().out
    assert str(folder) in out
    assert "peak_GiB" in out
    assert "left out" not in out

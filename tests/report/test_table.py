"""`smezo table`: every table points at what exists, and cells say what the runs say."""

import csv
import io
import json
import os
import signal
import statistics
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

from smezo_cli import __version__, train
from smezo_cli.cli import table as table_cli
from smezo_cli.cli.verbs import main
from smezo_cli.config.compose import grid
from smezo_cli.config.composer import Composer
from smezo_cli.config.fixed import CONF_DIR
from smezo_cli.files import sealed
from smezo_cli.report import table as table_module
from tests.run.processes import Started, smezo, until

# What tables wait for. When it arrives, give its rows and columns their commands.
AWAITED = {
    "a column that is a mean over tasks",
    "a grid of learning rates for method=sgd",
    "method=subzero_gv",
    "method=svd0",
    "model=llama-13b",
    "model=llama-70b",
    "HiZOO on LoRA",
    "HiZOO on a prefix",
    "SubZero on a prefix",
    "SubZero+ with SGD",
    "ZO-AdaMU on LoRA",
    "prompt tuning",
    "task=winogrande",
}
TINY = """\
title: tiny
source: no paper
command: >-
  model=tiny-llama device=cpu batch_size=4 steps=2 eval_every=1 task.prompt=0
  task.num_train=16 task.num_dev=8 task.num_test=8
seeds: [0, 1]
marks: { "!": made up }
columns:
  toy: { command: task=toy }
  later: { command: null, awaits: task=later }
rows:
  Zero-shot: { command: "", of: MeZO, quantity: zero_shot, paper: [50.0] }
  Untrained: { command: method=zero_shot, one_seed: true, no_steps: true }
  MeZO: { command: "method=mezo lr=1e-3,1e-2", paper: ["40.0 (1.5)!"] }
  Nothing: { command: null, awaits: method=nothing }
"""


def test_what_is_awaited_is_listed_and_has_not_arrived() -> None:
    lines = [
        line for name in table_module.names() for t in [table_module.load(name)] for line in t.rows
    ]
    lines += [line for name in table_module.names() for line in table_module.load(name).columns]
    awaited = {line.awaits for line in lines if line.command is None}
    assert awaited == AWAITED
    arrived = [
        what
        for what in awaited
        for group, equals, choice in [what.partition("=")]
        if equals and " " not in what and (CONF_DIR / group / f"{choice}.yaml").exists()
    ]
    assert not arrived, "fill the commands of these in conf/table/"


@pytest.mark.parametrize("name", table_module.names())
def test_a_line_of_a_table_has_no_key_that_is_not_read(name: str) -> None:
    """An unquoted comma in a command makes keys of what follows it."""
    read = {field.name for field in fields(table_module.Line)} - {"name"}
    node: Any = OmegaConf.load(CONF_DIR / "table" / f"{name}.yaml")
    for line in (*node["columns"].items(), *node["rows"].items()):
        assert set(line[1]) <= read, line


def _distinct() -> list[tuple[str, ...]]:
    """The rows of every table on its first column that has a command."""
    found = {}
    for name in table_module.names():
        t = table_module.load(name)
        for column in t.columns:
            for row in t.rows:
                words = t.words(row, column)
                if words is not None:
                    found.setdefault((row.command, t.common), words)
    return list(found.values())


def test_every_row_composes_and_every_column_names_what_is_there() -> None:
    with Composer(None) as composer:  # one for all is faster than grid()
        for words in _distinct():
            assert any(word.startswith(("experiment=", "method=")) for word in words)
            grid(words, composer)
    for name in table_module.names():
        t = table_module.load(name)
        for row in t.rows:
            assert len(row.paper) in {0, *range(1, len(t.columns) + 1)}
            for printed in row.paper:
                assert printed is None or not printed.mark or printed.mark in t.marks
            for column in t.columns:
                for word in t.words(row, column) or ():
                    group, _, choice = word.partition("=")
                    if group in ("task", "model", "method", "experiment"):
                        assert (CONF_DIR / group / f"{choice}.yaml").is_file(), (name, word)


def test_a_seed_that_is_named_twice_is_one() -> None:
    assert table_module.load("small/1", ["seed=3,1,3"]).seeds == (3, 1)


def test_what_two_tables_have_in_common_is_the_same_run() -> None:
    """Cross-entropy in MeZO's Table 3 is that of its Table 18, so one search serves both."""
    third, whole = table_module.load("mezo/3"), table_module.load("mezo/18-k512")
    rows = {row.name: row for row in whole.rows}
    columns = {column.name: column for column in whole.columns}
    for row in third.rows[:2]:
        for column in third.columns[:4]:
            same = whole.words(rows[row.name.partition(",")[0]], columns[column.name])
            assert same is not None
            assert set(third.words(row, column) or ()) == set(same)
    squad = third.words(third.rows[0], third.columns[4]) or ()
    assert {"experiment=mezo/ft", "batch_size=8"} <= set(squad)


def test_a_printed_row_of_several_papers_says_whose_run_it_is() -> None:
    tables = [table_module.load(name) for name in table_module.names()]
    assert any(len(t.sources) > 1 for t in tables)
    for t in tables:
        printed = [row for row in t.rows if any(row.paper)]
        assert {row.by for row in printed} - {""} == set(t.sources), t.id
        assert all(bool(row.by) == bool(t.sources) for row in printed), t.id
        assert not any(row.by for row in t.rows if row not in printed), t.id


@pytest.mark.parametrize(
    ("name", "of_paper", "renamed"),
    [
        ("opt-13b", "mezo/1", {"FT": "FT (AdamW)"}),
        ("roberta-k16", "mezo/18-k16", {}),
        ("roberta-k512", "mezo/18-k512", {}),
    ],
)
def test_a_row_that_is_in_two_tables_has_one_command_and_one_value(
    name: str, of_paper: str, renamed: dict[str, str]
) -> None:
    """MeZO's own rows beside those of later papers are those of its tables, so a run fills both."""
    field, own = table_module.load(f"field/{name}"), table_module.load(of_paper)
    rows = {row.name: row for row in field.rows if row.by == "MeZO"}
    assert len(rows) >= 4
    assert [column.name for column in field.columns] == [column.name for column in own.columns]
    both = [(row, rows.pop(renamed.get(row.name, row.name), None)) for row in own.rows]
    assert not rows
    for its, ours in both:
        if ours is not None:
            assert its.paper == ours.paper
            assert [own.words(its, c) for c in own.columns] == [
                field.words(ours, c) for c in field.columns
            ]


def test_whose_run_a_printed_value_is_stands_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["table", "field/opt-13b", "--runs-dir", str(tmp_path), "--column", "WSC"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "|  | LOZO | 61.5 |" in out
    assert "|  | SVD-0 | 63.5? |" in out
    assert "LOZO: LOZO's run: arXiv 2410.07698" in out
    assert "|  | paper |" not in out
    assert main([*line, "--format", "csv"]) == 0
    records = {r["row"]: r for r in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    keys = ("paper", "mark", "by")
    assert [records["FZOO"][key] for key in keys] == ["63.5", "†", "FZOO"]
    assert [records["SubZero (SubZero+'s run)"][key] for key in keys] == ["", "", ""]


def test_the_commands_of_empty_cells_are_folded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three of them, and how to see the others."""

    def commands(*words: str) -> list[str]:
        assert main(["table", "sparse-mezo/1", "--runs-dir", str(tmp_path), *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line.strip() for line in lines if line.startswith("    ")]

    few, every = commands(), commands("--commands")
    assert few[:3] == every[:3]
    assert few[3:] == [f"... and {len(every) - 3} more: smezo table sparse-mezo/1 --commands"]
    assert all(line.startswith("smezo train ") for line in every)


@pytest.mark.parametrize("name", table_module.names())
@pytest.mark.parametrize("form", ["markdown", "latex", "csv", "json"])
def test_every_table_prints_without_runs(
    name: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", name, "--runs-dir", str(tmp_path), "--format", form]) == 0
    out = capsys.readouterr().out
    t = table_module.load(name)
    assert all(row.name.split("_")[0] in out for row in t.rows)
    if form == "json":
        cells = json.loads(out)["cells"]
        assert len(cells) == len(t.rows) * len(t.columns)
        assert all(bool(cell["command"]) != bool(cell["why"]) for cell in cells)
    if form == "csv":
        assert len(list(csv.DictReader(io.StringIO(out)))) == len(t.rows) * len(t.columns)


@pytest.fixture
def tiny(
    one_thread: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    """A table of tiny runs; call it with further words for its cells by row, and its notes."""
    (tmp_path / "conf" / "table").mkdir(parents=True)
    (tmp_path / "conf" / "table" / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(table_module, "CONF_DIR", tmp_path / "conf")
    monkeypatch.chdir(tmp_path)

    def read(*words: str) -> tuple[dict[str, Any], list[str]]:
        capsys.readouterr()
        assert main(["table", "tiny", "--format", "json", "--column", "toy", *words]) == 0
        found = json.loads(capsys.readouterr().out)  # what the runs say is on stderr
        return {cell["row"]: cell for cell in found["cells"]}, found["notes"]

    return read


def test_a_table_is_filled_run_by_run_and_dev_chooses(tiny: Any) -> None:
    """Empty, then half of the grid, then the grid, then all; and what differs is named."""
    cells, notes = tiny()
    assert cells["MeZO"]["command"].endswith("task=toy seed=0")
    assert (cells["MeZO"]["ours"], notes) == (None, [])
    assert cells["Nothing"]["why"] == "method=nothing is not in smezo yet"

    base = cells["MeZO"]["command"].split()[2:]
    one = ["lr=1e-3" if word.startswith("lr=") else word for word in base]
    assert main(["train", *one]) == 0
    cells, _ = tiny()
    assert cells["MeZO"]["ours"] is None
    assert cells["MeZO"]["command"].endswith("task=toy seed=0")

    assert main(["train", "-m", *base]) == 0
    cells, _ = tiny()
    best = cells["MeZO"]
    assert (best["n"], best["sd"]) == (1, None)
    results = [json.loads(p.read_text()) for p in Path("runs").rglob("result.json")]
    chosen = max(results, key=lambda r: (r["dev"]["best"]["accuracy"], -r["dev"]["best"]["loss"]))
    assert best["ours"] == 100 * chosen["test"]["accuracy"]
    assert best["setting"] == f"lr={chosen['lr']}"
    assert best["command"].split()[-1] == "seed=1"
    assert f"lr={chosen['lr']}" in best["command"].split()

    cells, _ = tiny("--run")
    results = [json.loads(p.read_text()) for p in Path("runs").rglob("result.json")]
    untrained = [r for r in results if r["method"] == "zero_shot"]
    assert [r["seed"] for r in untrained] == [0]  # no seed changes it
    assert (cells["Untrained"]["n"], cells["Untrained"]["command"]) == (1, None)
    assert cells["Untrained"]["ours"] == 100 * untrained[0]["test"]["accuracy"]
    ours = [100 * r["test"]["accuracy"] for r in results if r["lr"] == chosen["lr"]]
    assert len(ours) == 2
    assert cells["MeZO"]["ours"] == pytest.approx(statistics.mean(ours))
    assert cells["MeZO"]["sd"] == pytest.approx(statistics.stdev(ours))
    assert cells["MeZO"]["difference"] == pytest.approx(statistics.mean(ours) - 40)
    assert cells["MeZO"]["command"] is None
    zero = [100 * r["zero_shot"]["accuracy"] for r in results if r["lr"] == chosen["lr"]]
    assert cells["Zero-shot"]["ours"] == pytest.approx(statistics.mean(zero))
    before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("result.json")}
    tiny("--run")
    assert before == {p: p.stat().st_mtime_ns for p in Path("runs").rglob("result.json")}

    # Other settings: nothing is taken, and why is said.
    cells, notes = tiny("batch_size=2", "seed=0")
    assert cells["MeZO"]["ours"] is None
    assert any("batch_size=4 where the table has 2" in note for note in notes)

    # Another version's numbers, and other rows, are refused by name.
    for key, value, says in (
        ("versions", {"smezo": "0.0.1"}, "it is of smezo 0.0.1"),
        ("versions", {"smezo": __version__, "numerics": 0}, f"of smezo {__version__}, numerics 0"),
        ("test_rows", "elsewhere", "its test rows are not those of"),
    ):
        file = next(
            p for p in Path("runs").rglob("result.json") if json.loads(p.read_text())["seed"] == 1
        )
        text = file.read_text()
        file.write_text(json.dumps(json.loads(text) | {key: value, "ended": "2000"}))
        cells, notes = tiny()
        assert cells["MeZO"]["n"] == 1
        assert cells["MeZO"]["command"].endswith("seed=1")
        assert any(str(file.parent) in note and says in note for note in notes)
        file.write_text(text)


SEARCHED = """\
title: searched
source: no paper
command: >-
  model=tiny-llama device=cpu batch_size=4 eval_every=1 task.prompt=0 zero_shot=false
  task.num_train=16 task.num_dev=8 task.num_test=8
seeds: [1, 2]
search_seed: 0
search_by: loss
columns: { toy: { command: task=toy } }
rows:
  MeZO: { command: method=mezo steps=4, search: "task.num_test=2 steps=2 lr=1e-3,3e-2" }
  Adam: { command: method=mezo_adam steps=4, search: "steps=1 lr=1e-3,1e-2", seeds: [1, 2, 3] }
"""


def test_a_search_of_its_own_goes_before_the_seeds(tiny: Any) -> None:
    """Fewer steps, a seed that is not among those of the cell, the choice by the dev loss."""
    Path("conf/table/tiny.yaml").write_text(SEARCHED)
    cells, _ = tiny("--run")
    results = [json.loads(p.read_text()) for p in Path("runs").rglob("result.json")]
    for row, method, steps, seeds in (
        ("MeZO", "mezo", 2, [1, 2]),
        ("Adam", "mezo_adam", 1, [1, 2, 3]),
    ):
        searched = [r for r in results if r["method"] == method and r["seed"] == 0]
        assert [r["steps"] for r in searched] == [steps] * 2
        best = min(searched, key=lambda r: r["dev"]["best"]["loss"])
        finals = [r for r in results if r["method"] == method and r["seed"] != 0]
        assert sorted(r["seed"] for r in finals) == seeds
        assert {(r["steps"], r["lr"]) for r in finals} == {(4, best["lr"])}
        assert cells[row]["setting"] == f"lr={best['lr']}"
        mean = statistics.mean(100 * r["test"]["accuracy"] for r in finals)
        assert cells[row]["ours"] == pytest.approx(mean)
        assert cells[row]["command"] is None
    ours = {row: cell["ours"] for row, cell in cells.items()}
    # Seeds on the line are those of every row, and the search stays as it was.
    cells, _ = tiny("seed=1,2,3,4")
    assert [cells[row]["command"].split()[-1] for row in ("MeZO", "Adam")] == ["seed=3,4", "seed=4"]
    # What is collected has the runs of the search, too.
    assert main(["table", "tiny", "--collect", "kept"]) == 0
    assert len(list(Path("kept").glob("*.json"))) == len(results)
    again, _ = tiny("--results", "kept")
    assert {row: cell["ours"] for row, cell in again.items()} == ours


def test_the_best_of_a_search_are_run_whole_before_one_is_chosen(tiny: Any) -> None:
    """A short run may like an lr that a whole one does not bear."""
    text = SEARCHED.replace("search_by: loss\n", "search_by: loss\nfinals: 2\n")
    text = text.replace("lr=1e-3,3e-2", "lr=1e-4,1e-3,3e-2")
    Path("conf/table/tiny.yaml").write_text("".join(text.splitlines(True)[:-1]))
    cells, _ = tiny("--run")
    results = [json.loads(p.read_text()) for p in Path("runs").rglob("result.json")]

    def losses(steps: int, seed: int) -> dict[float, float]:
        return {
            r["lr"]: r["dev"]["best"]["loss"]
            for r in results
            if (r["steps"], r["seed"]) == (steps, seed)
        }

    trials, finals = losses(2, 0), losses(4, 1)
    assert set(trials) == {1e-4, 1e-3, 3e-2}
    assert set(finals) == set(sorted(trials, key=lambda lr: trials[lr])[:2])
    best = min(finals, key=lambda lr: finals[lr])
    assert set(losses(4, 2)) == {best}
    assert len(results) == 3 + 2 + 1
    assert (cells["MeZO"]["setting"], cells["MeZO"]["n"]) == (f"lr={best}", 2)
    assert cells["MeZO"]["command"] is None
    assert main(["table", "tiny", "--collect", "kept"]) == 0
    assert len(list(Path("kept").glob("*.json"))) == len(results)


def test_collected_results_fill_the_table_without_their_runs(
    tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same cells from files alone; what was changed, or is of other settings, is named."""
    results = Path("results")
    by_runs, _ = tiny("--run", "--collect", "results", "task.max_train_tokens=64")
    again, notes = tiny("--results", "results", "task.max_train_tokens=64")
    assert (again, notes) == (by_runs, [])
    files = sorted(results.glob("*.json"))
    assert len(files) == 4  # zero-shot; two learning rates, and the chosen one with the second seed

    # To the byte once more, with the runs and from the files; and nothing says where it ran.
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    tiny("--collect", "results", "task.max_train_tokens=64")
    tiny("--collect", "results", "--results", "results", "task.max_train_tokens=64")
    assert before == {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in results.iterdir()}
    assert not any(str(Path.cwd()) in file.read_text() for file in files)
    assert "runs_dir" not in files[0].read_text()

    # Paired by test row, from files as from runs, and as reckoned here from what each run keeps.
    less = ("--less", "Untrained", "task.max_train_tokens=64")
    by_runs_less, _ = tiny(*less)
    assert tiny("--results", "results", *less)[0] == by_runs_less
    kept = {
        (r["method"], r["lr"], r["seed"]): load_file(p.parent / "scores.safetensors")[
            "outcome.test"
        ]
        for p in Path("runs").rglob("result.json")
        for r in [json.loads(p.read_text())]
    }
    lr = float(by_runs["MeZO"]["setting"].partition("=")[2])
    trained = (kept["mezo", lr, 0] + kept["mezo", lr, 1]) / 2
    gains = (100 * (trained - kept["zero_shot", None, 0])).tolist()
    assert by_runs_less["MeZO"]["less"] == pytest.approx(statistics.mean(gains))
    error = statistics.pstdev(gains) / len(gains) ** 0.5
    assert by_runs_less["MeZO"]["less_se"] == pytest.approx(error)
    assert error > 0
    assert [by_runs_less[row]["less"] for row in ("Untrained", "Zero-shot", "Nothing")] == [
        None
    ] * 3

    # Files of before they had outcomes: collected as they are, and named where they would count.
    of_before = Path("before")
    of_before.mkdir()
    for file in files:
        content = sealed.unsealed(json.loads(file.read_text()))
        assert content is not None
        content.pop("outcomes")
        (of_before / file.name).write_text(json.dumps(sealed.sealed(content)))
    old, notes = tiny("--results", "before", "--collect", "again", *less)
    assert {row: cell["ours"] for row, cell in old.items()} == {
        row: cell["ours"] for row, cell in by_runs.items()
    }
    assert old["MeZO"]["less"] is None
    assert any("MeZO less Untrained" in note and "older version" in note for note in notes)
    assert len(list(Path("again").glob("*.json"))) == len(files)
    # Rows that are missing are damage, though the seal is right.
    content = sealed.unsealed(json.loads(files[0].read_text())) or {}
    content["outcomes"] = content["outcomes"][1:]
    (of_before / files[0].name).write_text(json.dumps(sealed.sealed(content)))
    _, notes = tiny("--results", "before", "task.max_train_tokens=64")
    assert any(files[0].name in note and "changed since" in note for note in notes)

    # The command of a file is its run: the run is there already.
    runs = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("result.json")}
    for file in files:
        line = json.loads(file.read_text())["command"]
        assert main(line[1:]) == 0
    assert runs == {p: p.stat().st_mtime_ns for p in Path("runs").rglob("result.json")}

    # Files count beside runs when they are asked for, so that --run has nothing to do.
    Path("runs").rename("away")
    assert tiny("task.max_train_tokens=64")[0]["MeZO"]["ours"] is None
    assert tiny("--run", "--results", "results", "task.max_train_tokens=64")[0] == by_runs
    assert not Path("runs").exists()

    # Other settings, a changed file, another version.
    cells, notes = tiny("--results", "results", "batch_size=2")
    assert cells["MeZO"]["ours"] is None
    assert sum("batch_size=4 where the table has 2" in note for note in notes) == 2
    assert main(["table", "tiny", "--results", "results", "seed=7"]) == 0
    assert capsys.readouterr().out.count("left out: no cell of this table asks for it") == 4
    text = files[0].read_text()
    files[0].write_text(json.dumps(json.loads(text) | {"looks": []}))
    cells, notes = tiny("--results", "results", "task.max_train_tokens=64")
    assert cells["MeZO"]["command"] is not None
    assert [note for note in notes if str(files[0]) in note and "changed since" in note]
    content = json.loads(text)
    content["result"] |= {"versions": {"smezo": "0.0.1"}, "ended": "2000"}
    files[0].write_text(json.dumps(sealed.sealed(content)))
    _, notes = tiny("--results", "results", "task.max_train_tokens=64")
    assert [note for note in notes if str(files[0]) in note and "of smezo 0.0.1" in note]

    capsys.readouterr()
    assert main(["table", "tiny", "--results", "nowhere"]) == 2
    assert "--results nowhere: there is no such folder" in capsys.readouterr().err


def test_run_interrupted_and_killed_ends_with_the_complete_table(tmp_path: Path) -> None:
    """Ctrl-C, then a kill, then to the end: nothing is missing, and no run was done twice."""
    grid = "task=toy model=tiny-llama task.prompt=0 steps=40 eval_every=20 full_save_every=10"
    words = ["table", "small/1", "--run", "--row", "MeZO", "--column", "rotten_tomatoes"]
    words += ["--format", "json", *grid.split(), "device=cpu", "batch_size=4"]
    words += ["lr=1e-3,1e-2", "seed=0,1", f"--runs-dir={tmp_path / 'runs'}"]

    def done() -> dict[Path, str]:
        files = {f: f.read_text() for f in tmp_path.rglob("result.json")}
        return {f: text for f, text in files.items() if json.loads(text)["status"] == "done"}

    def sizes() -> dict[Path, int]:
        return {f: f.stat().st_size for f in tmp_path.rglob("metrics.jsonl")}

    seen: dict[Path, str] = {}
    for how in (signal.SIGINT, signal.SIGKILL):
        begun = sizes()
        with Started(words, tmp_path, program=main) as started:
            # In the middle of a run, or close to its end.
            until(
                lambda begun=begun, started=started: (
                    not started.alive or any(n > begun.get(f, 0) for f, n in sizes().items())
                )
            )
            os.kill(started.pid, how)
            ended = started.wait()
        assert ended.code == (130 if how == signal.SIGINT else -signal.SIGKILL)
        assert seen.items() <= done().items()
        seen = done()
        assert len(seen) < 3
    end = smezo(words, tmp_path, program=main)
    assert end.code == 0, end.err
    (cell,) = json.loads(end.out)["cells"]
    assert (cell["n"], cell["command"]) == (2, None)
    assert seen.items() <= done().items()
    assert len(done()) == len(list(tmp_path.rglob("metrics.jsonl"))) == 3
    assert all(json.loads(text)["num_forwards"] == 80 for text in done().values())


def test_a_run_that_crashed_is_worse_than_one_that_was_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes = iter((1, 2))
    monkeypatch.setattr(train, "main", lambda words: next(codes))
    cells = [SimpleNamespace(missing=(word,)) for word in ("seed=0", "seed=1")]
    assert table_cli._run(lambda: (cells, None), is_data=False) == 1


def test_a_result_that_names_a_place_is_not_collected(
    tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cells, _ = tiny("--run", "seed=0")
    assert cells["MeZO"]["command"] is None
    file = next(Path("runs").rglob("result.json"))
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"recipes": ["/home/some body/my recipe.yaml"]}))
    assert main(["table", "tiny", "seed=0", "--collect", "results"]) == 2
    err = capsys.readouterr().err
    assert "its result.recipes is a place on this machine" in err
    assert err.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("sparse-mezo/9", "no table sparse-mezo/9"),
        ("small/1 rt:task.data_dir=x", "no column rt, did you mean rte?"),
        ("small/1 --row MeZo", "no such row, did you mean MeZO"),
        ("small/1 --format xml", "no such format"),
        ("small/1 --less MeZo", "--less MeZo: there is no such row, did you mean MeZO"),
        ("small/1 --less MeZO --row R-MeZO", "add --row MeZO beside the others"),
        ("small/1 --less MeZO --row MeZO", "add --row NAME"),
        ("sparse-mezo/memory --less FT", "nothing can be paired"),
        ("small/1 seed", "not of the form KEY=VALUE"),
        *[
            (f"small/1 seed={bad}", "seeds of a table are whole numbers of at least 0: seed=0,1,2")
            for bad in ("a", "", "1.5", "range(0,3)", "-1", "0,", str(2**63))
        ],
        ("small/1 --runs-dir nowhere", "--runs-dir nowhere: there is no such folder"),
    ],
)
def test_mistake_is_one_sentence(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err

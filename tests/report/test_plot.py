"""`smezo plot`: what is drawn is what the runs say, read back from the axes."""

import importlib.util
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("matplotlib") is None:
    pytest.skip("matplotlib is not installed: pip install 'smezo[plots]'", allow_module_level=True)

from smezo_cli.cli import plot
from smezo_cli.cli.verbs import main
from smezo_cli.errors import UserError
from smezo_cli.report import cells, curves, draw, figures
from smezo_cli.report import series as series_module
from smezo_cli.report import table as table_module
from smezo_cli.report.runs import find
from smezo_cli.report.series import Source

Looks = dict[int, float]
TINY = """\
title: tiny
source: no paper
command: >-
  model=tiny-llama device=cpu batch_size=4 steps=2 eval_every=1 task.prompt=0
  task.num_train=16 task.num_dev=8 task.num_test=8
seeds: [0, 1]
columns:
  toy: { command: task=toy }
rows:
  Zero-shot: { command: "", of: MeZO, quantity: zero_shot }
  MeZO: { command: "method=mezo lr=1e-3,1e-2" }
  As it came: { command: method=zero_shot, one_seed: true, no_steps: true }
"""


def make(
    root: Path,
    score: float = 0.5,
    *,
    looks: Looks | None = None,
    losses: list[float] | None = None,
    status: str = "done",
    mask: str = "",
    refresh: int = 0,
    sparsity: float | None = None,
    dev: float = 0.5,
    task: str = "toy",
    method: str = "",
    objective: str = "",
    rows: tuple[str, str] = ("aa", "bb"),
    **settings: Any,
) -> Path:
    """A run folder as training leaves it."""
    config: dict[str, Any] = {"seed": 0, "lr": 1e-4, "steps": 4, "eval_every": 2} | settings
    method = method or ("sparse_mezo" if mask else "mezo")
    node: dict[str, Any] = {"name": method, "lr": config["lr"]}
    if mask:
        node |= {"mask": mask, "mask_refresh_every": refresh}
    if objective:
        node["objective"] = objective
    config |= {"task": {"name": task}, "method": node, "sparsity": sparsity}
    folder = root / f"{len(list(root.glob('*'))):03}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(config))
    done = status == "done"
    result = {
        **{"status": status, "task": task, "model": "tiny-llama", "method": method},
        **{"metric": "accuracy", "lr": config["lr"], "seed": config["seed"], "device": "cpu"},
        "sparsity": {"requested": sparsity, "realised": sparsity or 0.0},
        "steps": config["steps"],
        "step": config["steps"],
        "test": {"accuracy": score} if done else None,
        "zero_shot": {"accuracy": 0.25},
        "dev": {"best": {"step": 2, "accuracy": dev, "loss": 1.0}},
        "objective": objective or "loss",
        "test_rows": rows[0],
        "train_rows": rows[1],
        "train_seconds": 2.0,
        "peak_memory_bytes": 3_000_000_000 + config["seed"],
    }
    (folder / "result.json").write_text(json.dumps(result))
    lines: list[dict[str, Any]] = []
    for step in range(1, config["steps"] + 1):
        loss = losses[step - 1] if losses else 1.0
        grads = [] if method == "adamw" else [1.0, 2.0]
        line = {"step": step, "loss": loss, "projected_grad": grads, "seconds": 0.5}
        lines.append(line | {"num_forwards": 2 * len(grads) or 1})
        if looks and step in looks:
            value = looks[step]
            lines.append(
                {"step": step, "dev.accuracy": value, "dev.loss": 1 - value, "active_share": value}
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def axes_of(figure: series_module.Figure) -> Any:
    """The axes of its only panel."""
    (axes,) = draw.page(figure).axes
    return axes


def source(root: Path) -> list[Source]:
    return [Source(tuple(find(root)))]


def lines_of(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Label to what is drawn."""
    found = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        line = handle.lines[0] if hasattr(handle, "lines") else handle
        found[label] = (list(line.get_xdata()), list(line.get_ydata()))
    return found


@pytest.mark.parametrize(("x", "places"), [("steps", [2, 4]), ("forwards", [8, 16]),
                                           ("seconds", [1.0, 2.0])])  # fmt: skip
def test_a_curve_is_the_mean_of_the_seeds_and_its_band_their_deviation(
    x: str, places: list[float], tmp_path: Path
) -> None:
    """Two queries a step are four forwards."""
    values = [{2: 0.5, 4: 0.6}, {2: 0.7, 4: 0.6}, {2: 0.6, 4: 0.9}]
    for seed, looks in enumerate(values):
        make(tmp_path, looks=looks, seed=seed)
    axes = axes_of(curves.curve(source(tmp_path), x=x))
    (label, (xs, ys)), *rest = lines_of(axes).items()
    assert (label, rest) == ("MeZO (n = 3)", [])
    assert xs == pytest.approx(places)
    assert ys == pytest.approx([100 * statistics.mean(v[k] for v in values) for k in (2, 4)])
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    top = max(y for at, y in corners if at == xs[0])
    assert top == pytest.approx(ys[0] + 100 * statistics.stdev([0.5, 0.7, 0.6]))
    assert axes.get_ylabel() == "dev accuracy (%)"
    assert axes.get_legend().get_title().get_text() == "mean ± sd over n seeds"


@pytest.mark.parametrize("by_step", [True, False])
def test_forwards_are_those_that_the_steps_took(by_step: bool, tmp_path: Path) -> None:
    """FZOO's eight losses and the one at the weights; of older runs the mean over all steps."""
    folder = make(tmp_path, looks={2: 0.5, 4: 0.6}, method="fzoo")
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if "seconds" in line:
            del line["num_forwards"]
            line |= {"projected_grad": [1.0] * 8} | ({"num_forwards": 9} if by_step else {})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = json.loads((folder / "result.json").read_text()) | {"num_forwards": 36}
    (folder / "result.json").write_text(json.dumps(result))
    figure = curves.curve(source(tmp_path), x="forwards")
    assert figure.panels[0].series[0].x == (18, 36)


def test_a_seed_that_was_run_twice_is_drawn_once_and_that_is_said(tmp_path: Path) -> None:
    curve, rates = tmp_path / "curve", tmp_path / "lr"
    make(curve, looks={2: 0.5, 4: 0.6})
    make(curve, looks={1: 0.5, 2: 0.7, 3: 0.5, 4: 0.8}, eval_every=1)
    for score in (0.5, 0.7):
        make(rates, score)
    for figure, values in (
        (curves.curve(source(curve)), ((50,), (60,))),
        (figures.lr(source(rates)), ((50,),)),
    ):
        ((series,),) = [panel.series for panel in figure.panels]
        assert series.values == values
        assert sum("repeats seed 0" in note for note in figure.notes) == 1


def test_one_seed_has_no_band_and_that_is_said(tmp_path: Path) -> None:
    make(tmp_path, looks={2: 0.5, 4: 0.6})
    axes = axes_of(curves.curve(source(tmp_path), y="loss"))
    assert lines_of(axes) == {"MeZO (n = 1)": ([2, 4], [0.5, 0.4])}
    assert not axes.collections
    assert "no spread" in axes.get_legend().get_title().get_text()


def test_seeds_with_other_looks_meet_at_common_ones_alone(tmp_path: Path) -> None:
    make(tmp_path, looks={1: 0.1, 2: 0.2, 4: 0.4}, eval_every=1)
    make(tmp_path, looks={2: 0.4, 4: 0.6}, seed=1)
    figure = curves.curve(source(tmp_path))
    ((series,),) = [panel.series for panel in figure.panels]
    assert series.x == (2, 4)
    assert series.mean == pytest.approx([30, 50])
    assert "have 2 of 3 evaluations in common" in figure.notes[0]


def test_seeds_that_draw_their_rows_are_one_line(tmp_path: Path) -> None:
    """As in table mezo/18-k16; seeds whose rows are of another draw than their own are not."""
    for seed in (13, 21):
        rows = (f"a{seed}", f"b{seed}")
        make(tmp_path, 0.5, looks={2: 0.5, 4: 0.6}, seed=seed, data_seed=seed, rows=rows)
    figure = curves.curve(source(tmp_path))
    assert [s.label for s in figure.panels[0].series] == ["MeZO (n = 2)"]
    # A table compares the test rows of each split; without one they may be of anything.
    chosen = [Source(tuple(find(tmp_path)), "MeZO", chosen=True)]
    assert figures.lr(chosen).panels[0].series[0].values == ((50, 50),)
    with pytest.raises(UserError, match="tested on 2 different sets of rows"):
        figures.lr(source(tmp_path))
    make(tmp_path, looks={2: 0.5}, seed=42, data_seed=21, rows=("a21", "b21"))
    names = [s.name for s in curves.curve(source(tmp_path)).panels[0].series]
    assert len(names) == 2
    assert all("data_seed=" in name for name in names)


def test_runs_of_before_a_key_came_are_those_that_say_what_it_was(tmp_path: Path) -> None:
    """Their digests are the same, and so is their line; other objectives have no axis in common."""
    make(tmp_path, looks={2: 0.5, 4: 0.6})
    make(tmp_path, looks={2: 0.5, 4: 0.6}, seed=1, objective="loss", patience=None)
    figure = curves.curve(source(tmp_path), y="train_loss")
    assert [s.label for s in figure.panels[0].series] == ["MeZO (n = 2)"]
    assert figure.panels[0].y == "train loss"
    make(tmp_path, looks={2: 0.5, 4: 0.6}, objective="accuracy")
    with pytest.raises(UserError, match="lowered accuracy and loss"):
        curves.curve(source(tmp_path), y="train_loss")
    names = [s.name for s in curves.curve(source(tmp_path)).panels[0].series]
    assert names == ["MeZO", "MeZO objective=accuracy"]
    of_accuracy = [Source(tuple(find(tmp_path)[2:]))]
    assert curves.curve(of_accuracy, y="train_loss").panels[0].y == "1 - train accuracy"


def test_methods_without_steps_are_drawn_where_they_have_a_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have memory and a level, and no learning rate, sparsity or active share."""
    monkeypatch.chdir(tmp_path)
    make(Path("runs"), 0.9, looks={2: 0.5, 4: 0.6}, method="mezo_adam")
    make(Path("runs"), 0.2, method="icl", lr=None, steps=0)
    runs = source(Path("runs"))
    assert [s.name for s in figures.memory(runs).panels[0].series] == ["ICL", "MeZO-Adam"]
    for found, says in (
        (figures.lr(runs), "ICL has no lr and is left out."),
        (figures.sparsity(runs), "ICL has no sparsity and is left out."),
        (curves.active(runs), "ICL: there is no active share (%) to draw."),
    ):
        assert [s.name for s in found.panels[0].series] == ["MeZO-Adam"]
        assert [note for note in found.notes if note.endswith(says)]
    assert main(["plot", "memory", "--out", "a.svg"]) == 0
    assert "left out" not in capsys.readouterr().out


def test_what_is_not_finite_leaves_a_gap_that_is_said(tmp_path: Path) -> None:
    make(tmp_path, losses=[3.0, math.nan, 1.0, 2.0])
    figure = curves.curve(source(tmp_path), y="train_loss")
    ((series,),) = [panel.series for panel in figure.panels]
    assert (series.x, series.mean) == ((1, 3, 4), [3.0, 1.0, 2.0])
    assert "1 of 4 values are not finite" in figure.notes[0]


def test_settings_that_differ_are_lines_of_their_own_with_names_that_say_so(
    tmp_path: Path,
) -> None:
    for rate in (1e-4, 1e-3):
        make(tmp_path, looks={2: 0.5}, lr=rate)
    make(tmp_path, looks={2: 0.5}, mask="random", sparsity=0.75)
    make(tmp_path, looks={2: 0.5}, method="adamw")
    figure = curves.curve(source(tmp_path), x="forwards")
    names = ["MeZO lr=0.0001", "MeZO lr=0.001", "R-MeZO 0.75", "FT"]
    assert [s.name for s in figure.panels[0].series] == names
    assert figure.panels[0].series[-1].x == (2,)
    assert "backward passes" in figure.notes[-1]


def test_accuracy_against_sparsity_has_mezo_at_zero_and_the_lr_that_dev_prefers(
    tmp_path: Path,
) -> None:
    """The best on test is not the one that is taken."""
    make(tmp_path, 0.4, lr=1e-4, dev=0.8)
    make(tmp_path, 0.9, lr=1e-3, dev=0.7)
    make(tmp_path, 0.6, lr=1e-4, seed=1)
    for refresh in (0, 20):
        for sparsity in (0.5, 0.75):
            make(tmp_path, sparsity, mask="small", sparsity=sparsity, refresh=refresh)
    make(tmp_path, 0.3, mask="random", sparsity=0.75)
    make(tmp_path, 0.2, mask="large", sparsity=0.75)
    figure = figures.sparsity(source(tmp_path))
    axes = axes_of(figure)
    lines = lines_of(axes)
    assert lines.pop("zero-shot")[1] == [25, 25]
    assert lines == {
        "MeZO (n = 2)": ([0], [50]),
        "S-MeZO (n = 1)": ([0.5, 0.75], [50, 75]),
        "S-MeZO refreshed (n = 1)": ([0.5, 0.75], [50, 75]),
        "R-MeZO (n = 1)": ([0.75], [30]),
        "Large mask (n = 1)": ([0.75], [20]),
    }
    (segment,) = axes.containers[0].lines[2][0].get_segments()
    spread = 100 * statistics.stdev([0.4, 0.6])
    assert list(segment[:, 1]) == pytest.approx([50 - spread, 50 + spread])
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left < 0 < 0.75 < right < 1
    assert low < 20 < 75 < high < 100
    assert figure.notes == [
        "toy, tiny-llama, MeZO at sparsity 0: lr=0.0001 of 0.0001, 0.001, by dev of seed 0."
    ]
    make(tmp_path, 0.9, batch_size=8)
    with pytest.raises(UserError, match=r"MeZO at sparsity 0: these runs differ in batch_size"):
        figures.sparsity(source(tmp_path))


def test_learning_rates_are_on_a_logarithmic_axis_and_divergence_is_marked(tmp_path: Path) -> None:
    for rate, status in ((1e-4, "done"), (1e-3, "done"), (1e-2, "diverged")):
        make(tmp_path, 100 * rate, lr=rate, status=status)
    axes = axes_of(figures.lr(source(tmp_path)))
    assert axes.get_xscale() == "log"
    lines = lines_of(axes)
    assert lines["MeZO (n = 1)"] == ([1e-4, 1e-3], pytest.approx([1, 10]))
    assert lines["MeZO: diverged"][0] == [1e-2]
    # With bars, which are moved aside where methods share a rate: all of them are in sight.
    for method in ("mezo", "lora"):
        for seed in (1, 2):
            make(tmp_path, 0.6 + seed / 10, lr=1e-3, method=method, seed=seed)
    axes = axes_of(figures.lr(source(tmp_path)))
    for (low, high), values in ((axes.get_xlim(), (1e-4, 1e-2)), (axes.get_ylim(), (1, 80))):
        assert low < min(values) < max(values) < high


def test_bars_are_the_largest_peak_and_active_shares_start_at_the_realised_one(
    tmp_path: Path,
) -> None:
    for seed in (0, 9):
        make(tmp_path, looks={2: 0.3, 4: 0.2}, mask="small", sparsity=0.75, seed=seed)
    axes = axes_of(figures.memory(source(tmp_path)))
    assert [bar.get_width() for bar in axes.patches] == [3.000000009]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["S-MeZO 0.75 (2 runs)"]
    assert axes.get_title() == "toy, tiny-llama, cpu"
    axes = axes_of(curves.active(source(tmp_path)))
    assert lines_of(axes) == {"S-MeZO 0.75 (n = 2)": ([0, 2, 4], pytest.approx([25, 30, 20]))}


def test_files_are_the_same_bytes_each_time_and_what_is_left_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks are two panels; an unfinished run is not averaged in."""
    monkeypatch.chdir(tmp_path)
    for task in ("toy", "rte"):
        make(tmp_path / "runs", looks={2: 0.5, 4: 0.6}, task=task)
    make(tmp_path / "runs", looks={2: 0.5}, status="running", seed=1)
    contents = []
    for _ in range(2):
        assert main(["plot", "curve", "--out", "a"]) == 0
        contents.append([(tmp_path / f"a.{form}").read_bytes() for form in ("png", "svg")])
    assert contents[0] == contents[1]
    assert "1 of 3 runs are left out: 1 running." in capsys.readouterr().out
    assert main(["plot", "curve", "status=running", "--out", "b.svg"]) == 0
    assert sorted(p.name for p in tmp_path.glob("*.*")) == ["a.png", "a.svg", "b.svg"]
    runs = [run for run in find(tmp_path / "runs") if run.result["status"] == "done"]
    titles = [panel.title for panel in curves.curve([Source(tuple(runs))]).panels]
    assert titles == ["rte, tiny-llama", "toy, tiny-llama"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("sparsty", "no such figure, did you mean sparsity?"),
        ("curve --y accurcy", "--y accurcy: there is no such axis, did you mean accuracy"),
        ("lr --x steps", "--x has no effect with lr"),
        ("curve --out a.pdf", "no such format, there are .png and .svg"),
        ("curve --out no/a", "no folder no"),
        ("curve --row MeZO", "--row, --column and --results are of a table"),
        ("curve small/1 small/2", "'small/2' is neither KEY=VALUE"),
        ("curve small/1 --row MeZo", "no such row, did you mean MeZO"),
        ("sparsity small/1", "no cell of these has runs in runs; smezo table small/1"),
        ("curve seed=7", "there are no runs in runs with seed=7"),
        ("curve status=failed", "these runs have nothing to draw"),
        ("sparsity status=failed", "no run in runs is finished (1 failed)"),
        ("curve --runs-dir nowhere", "--runs-dir nowhere"),
        ("memory seed=0", "9 tasks and models"),
        ("curve task=t0", "8 lines"),
    ],
)
def test_mistake_is_one_sentence(
    words: str,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for k in range(9):
        make(tmp_path / "runs", task=f"t{k}", looks={2: 0.5})
    for k in range(7):
        make(tmp_path / "runs", task="t0", looks={2: 0.5}, seed=1, lr=k + 1)
    make(tmp_path / "runs", status="failed", seed=2)
    assert main(["plot", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_a_missing_matplotlib_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plot", "curve"]) == 2
    assert "not installed: python -m pip install 'matplotlib" in capsys.readouterr().err


def test_a_table_gives_the_runs_that_it_took(
    one_thread: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is drawn is what the table prints; the grid is that of the first seed."""
    (tmp_path / "conf" / "table").mkdir(parents=True)
    (tmp_path / "conf" / "table" / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(table_module, "CONF_DIR", tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    assert main(["table", "tiny", "--run"]) == 0
    capsys.readouterr()
    drawn = {}
    found = plot._found

    def keep(kind: str, *rest: Any) -> series_module.Figure:
        drawn[kind] = found(kind, *rest)
        return drawn[kind]

    monkeypatch.setattr(plot, "_found", keep)
    for kind in plot.KINDS:
        assert main(["plot", kind, "tiny"]) == 0
        assert Path(f"plot-{kind}.svg").is_file()
    (cell,) = cells.Reader(table_module.load("tiny"), find(Path("runs"))).cells(["MeZO"], ["toy"])
    panel = drawn["sparsity"].panels[0]
    assert (panel.series[0].name, panel.series[0].x) == ("MeZO", (0,))
    assert panel.series[0].mean == [pytest.approx(cell.mean)]
    assert panel.series[0].sd == [pytest.approx(cell.sd)]
    assert len(panel.levels) == 1
    rates = drawn["lr"].panels[0].series[0]
    assert rates.x == (1e-3, 1e-2)
    assert sorted(map(len, rates.values)) == [1, 2]
    curve = drawn["curve"].panels[0].series[0]
    assert curve.x == (1, 2)
    # Small files that were collected have the same curve, and nothing but that.
    assert main(["table", "tiny", "--collect", "kept"]) == 0
    assert main(["plot", "curve", "tiny", "--results", "kept"]) == 0
    again = drawn["curve"].panels[0].series[0]
    assert (again.x, again.mean) == (curve.x, [pytest.approx(value) for value in curve.mean])
    capsys.readouterr()
    for words in (["curve", "tiny", "--x", "seconds"], ["active", "tiny"]):
        assert main(["plot", *words, "--results", "kept"]) == 2
        assert "is a collected result, which has dev accuracy by step" in capsys.readouterr().err

"""`smezo choose`: what fits, in the order of the arena, and how many steps a time allows."""

import json
from pathlib import Path

import pytest

from smezo_cli.cli import choose
from smezo_cli.cli.verbs import main
from smezo_cli.config.fixed import CONF_DIR

TOY = ["choose", "task=toy", "model=tiny-llama", "batch_size=2"]
FOUR = ["lozo", "mezo", "mezo_adam", "sparse_mezo"]


@pytest.fixture(autouse=True)
def of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four methods stand for all."""
    monkeypatch.setattr(choose, "_methods", lambda config_dir: FOUR)


@pytest.fixture
def arena(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An arena that has measured three of them, one on one bed."""
    points = {
        "mezo": {"films": [0.0, 0.0], "sources": [0.0, 0.0]},
        "sparse_mezo": {"films": [-1.5, 0.8], "sources": [0.5, 0.7]},
        "lozo": {"sources": [1.25, 0.9]},
    }
    path = tmp_path / "arena.json"
    path.write_text(json.dumps({"methods": points}))
    monkeypatch.setattr(choose, "ARENA", path)


def bench_of(seconds: dict[str, float], folder: Path) -> Path:
    """A file as `smezo bench --json` writes it, of these median seconds."""
    bench = {
        **{"model": "tiny-llama", "dtype": "float32", "compute_dtype": "float32"},
        **{"batch_size": 2, "length": 16, "median_seconds": seconds},
    }
    file = folder / "bench.json"
    file.write_text(json.dumps(bench))
    return file


def lines_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(words) == 0
    return capsys.readouterr().out.splitlines()


def test_the_order_is_the_mean_over_the_beds_and_what_was_not_measured_comes_last(
    arena: None, capsys: pytest.CaptureFixture[str]
) -> None:
    first, head, *rows = lines_of([*TOY, "--memory", "2GB"], capsys)
    assert first == "toy | tiny-llama | float32 | 2.0 GB"
    assert head.split("  ")[0] == "method"
    assert [row.split()[0] for row in rows[:4]] == ["lozo", "mezo", "sparse_mezo", "mezo_adam"]
    at = head.index("films, less MeZO"), head.index("sources, less MeZO")
    assert [rows[2][start : start + 11] for start in at] == ["-1.5 +- 0.8", "+0.5 +- 0.7"]
    assert [rows[0][start : start + 11].strip() for start in at] == ["", "+1.2 +- 0.9"]
    assert all(
        row.endswith(f"smezo train method={row.split()[0]} {' '.join(TOY[1:])}") for row in rows[:4]
    )
    assert "Larger models may rank otherwise." in rows[-2]
    assert rows[-1].startswith("What it has not measured yet follows, by peak memory")


def test_what_does_not_fit_is_said_with_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads("\n".join(lines_of([*TOY, "--memory", "2GB", "--json"], capsys)))
    peaks = {one["method"]: one["peak"] for one in record["methods"]}
    assert all(one["fits"] for one in record["methods"])
    assert max(peaks, key=lambda name: peaks[name]) == "mezo_adam"
    short = f"{(max(peaks.values()) - 1) / 1000:.3f}KB"
    lines = lines_of([*TOY, "--memory", short], capsys)
    assert f"does not fit: mezo_adam, which needs {peaks['mezo_adam'] / 1e9:.2f} GB" in lines
    assert sum("smezo train" in line for line in lines) == 3


def test_where_nothing_fits_nothing_is_said_of_an_order(
    arena: None, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of([*TOY, "--memory", "1KB"], capsys)
    assert sum(line.startswith("does not fit") for line in lines) == len(FOUR)
    assert not any("arena" in line for line in lines)


def test_what_cannot_be_is_said_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of([*TOY, "sparsity=0.5"], capsys)
    (said,) = (line for line in lines if line.startswith("not so: mezo:"))
    assert "sparsity" in said
    assert any(line.startswith("sparse_mezo ") for line in lines)


def test_hours_are_steps_by_a_measured_forward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bench_of({"forward": 2.0}, tmp_path)
    words = [*TOY, "steps=1000", "--hours", "0.5", "--bench", str(file), "--json"]
    record = json.loads("\n".join(lines_of(words, capsys)))
    found = {one["method"]: one for one in record["methods"]}
    costs = json.loads(choose.COSTS.read_text())["methods"]
    for name in FOUR:
        assert found[name]["steps"] == int(1800 / (2 * 2.0 * costs[name]["cost"]))
        assert found[name]["command"].endswith(f" steps={found[name]['steps']}")
    assert "steps in 0.5 h" in lines_of(words[:-1], capsys)[1]


def test_a_backward_pass_counts_as_two_forwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "_methods", lambda config_dir: ["adamw", "lora"])
    file = bench_of({"forward": 2.0}, tmp_path)
    words = [*TOY, "steps=1000", "--hours", "0.5", "--bench", str(file), "--json"]
    for found in json.loads("\n".join(lines_of(words, capsys)))["methods"]:
        assert found["steps"] == int(1800 / (3 * 2.0))
        assert found["forwards"] == "1, backward"


def test_a_method_of_the_user_that_nobody_has_timed_has_no_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "_methods", lambda config_dir: ["mine"])
    (tmp_path / "method").mkdir()
    mezo = (CONF_DIR / "method" / "mezo.yaml").read_text()
    (tmp_path / "method" / "mine.yaml").write_text(mezo.replace("name: mezo", "name: mine"))
    file = bench_of({"forward": 2.0}, tmp_path)
    words = [*TOY, "--hours", "1", "--bench", str(file), "--json", "--config-dir", str(tmp_path)]
    (found,) = json.loads("\n".join(lines_of(words, capsys)))["methods"]
    assert (found["steps"], found["forwards"]) == (None, "")
    assert found["command"].startswith(f"smezo train --config-dir {tmp_path} method=mine ")


def test_a_time_that_holds_not_one_step_has_no_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bench_of({"forward": 2.0}, tmp_path)
    words = [*TOY, "--hours", "1e-4", "--bench", str(file), "--json"]
    found = json.loads("\n".join(lines_of(words, capsys)))["methods"]
    assert [(one["steps"], one["command"]) for one in found] == [(0, "")] * len(FOUR)


def test_a_file_without_a_forward_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bench_of({"mezo": 2.0}, tmp_path)
    assert main([*TOY, "--hours", "1", "--bench", str(file)]) == 2
    assert "does not say what a forward takes; make it anew" in capsys.readouterr().err


def test_what_is_wrong_with_every_method_is_a_mistake_of_the_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such as a device that is not here, of which no memory is said."""
    assert main([*TOY, "device=cuda:7"]) == 2
    err = capsys.readouterr().err
    assert "say what memory it has, such as --memory 80GB" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["method=mezo"], "smezo plan method=mezo plans it"),
        (["--hours", "2"], "--hours and --bench go together"),
        (["--bench", "x.json"], "--hours and --bench go together"),
        (["--hours", "no", "--bench", "x.json"], "--hours no must be a number above 0"),
        (["--hours", "2", "--bench", "x.json"], "--bench x.json is no file of smezo bench"),
        (["--memory", "much"], "--memory much is no amount of memory"),
        (["tasks=rte"], "tasks"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TOY, *words]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1

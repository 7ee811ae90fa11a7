"""scripts/race.py: curves, textbook trainings in pieces, and a small race."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from smezo_cli.run.console import Console
from tests import ROOT
from tests.run.processes import smezo
from tests.scripts_loaded import script as load_script

TINY = ("model=tiny-llama", "task=toy", "batch_size=4", "device=cpu", "task.prompt=0")


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> SimpleNamespace:
    """The modules of scripts/race."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    names = ("curve", "textbook")
    return SimpleNamespace(**{name: importlib.import_module(f"race.{name}") for name in names})


def test_a_curve_has_the_seconds_of_the_steps_up_to_each_evaluation(race: SimpleNamespace) -> None:
    lines = [
        {"step": 1, "loss": 0.7, "seconds": 1.0},
        {"step": 2, "loss": 0.7, "seconds": 2.0},
        {"step": 2, "dev.loss": 0.6, "dev.accuracy": 0.7},
        {"step": 3, "loss": 0.7, "seconds": 4.0},
        {"step": 3, "dev.loss": 0.5, "dev.accuracy": 0.8},
    ]
    found = race.curve.of_metrics(lines)
    assert [(m.step, m.seconds, m.loss) for m in found] == [(2, 3.0, 0.6), (3, 7.0, 0.5)]
    assert race.curve.reached(found, 0.6).step == 2
    assert race.curve.reached(found, 0.55).step == 3
    assert race.curve.reached(found, 0.4) is None
    assert race.curve.lowest([*found, found[1].__class__(4, 8.0, 0.5, 0.8)]).step == 3


def test_textbook_steps_in_pieces_are_those_in_one(race: SimpleNamespace, tmp_path: Path) -> None:
    racer = race.textbook.TextbookRacer([*TINY, "lr=1e-2"], Console())

    def run(folder: str, steps: int) -> list[tuple[int, float]]:
        marks = racer.run(tmp_path / folder, lr=1e-2, seed=3, steps=steps, eval_every=2)
        return [(mark.step, mark.loss) for mark in marks]

    whole = run("whole", 4)
    assert run("pieces", 2) == whole[:1]
    run("another", 2)  # leaves other weights in the model
    assert run("pieces", 4) == whole
    assert whole[0][1] != whole[1][1]
    one, other = (load_file(tmp_path / f / "weights-4.safetensors") for f in ("whole", "pieces"))
    assert all(one[name].equal(other[name]) for name in one)
    assert [path.name for path in (tmp_path / "pieces").glob("weights*")] == [
        "weights-4.safetensors"
    ]


def test_a_small_race_goes_on_and_says_who_needed_how_many_seconds(
    race: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = load_script("race")

    def forked(command: list[str], check: bool) -> None:
        assert check
        assert command[:4] == [sys.executable, "-m", "smezo_cli", "train"]
        ended = smezo(command[4:], tmp_path)
        assert ended.code == 0, ended.err

    # A fork of what has torch imported takes a tenth of a new interpreter's seconds.
    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=forked))
    words = [*TINY[:-2], "lr=1e-3", "steps=4", "task.num_test=4", "method.freeze=[]", "eps=1e-3"]
    line = ["race.py", str(tmp_path / "race"), "--seeds", "0", "1", "--steps", "4"]
    line += ["--eval-every", "1", "--lrs", "1e-3", "1e-2", "--json", str(tmp_path / "race.json")]
    monkeypatch.setattr(sys, "argv", [*line, *(w for each in words for w in ("--word", each))])
    tables = []
    for _ in range(2):
        assert script.main() == 0
        lines = capsys.readouterr().out.splitlines()
        tables.append([line for line in lines if line.startswith("|")])
    assert len(tables[0]) == 2 + 4
    assert tables[0] == tables[1]  # nothing is made, and so timed, a second time
    found = json.loads((tmp_path / "race.json").read_text("utf-8"))
    assert found["lr"] in (1e-3, 1e-2)
    for seed in "01":
        goal, curves = found["goals"][seed], found["curves"][seed]
        assert goal["loss"] == min(mark["loss"] for mark in curves["textbook MeZO"])
        assert found["reached"][seed]["textbook MeZO"] == goal
        for curve in curves.values():
            assert [mark["step"] for mark in curve] == [1, 2, 3, 4]
            assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(curve))
    # Each lr is tried once; the first heat's MeZO makes the steps of the best.
    best = min(found["tried"], key=lambda name: min(m["loss"] for m in found["tried"][name]))
    assert set(found["tried"]) == {"MeZO, lr 0.001", "MeZO, lr 0.01"}
    assert best == f"MeZO, lr {found['lr']:g}"
    steps = [[m["loss"] for m in c] for c in (found["curves"]["0"]["MeZO"], found["tried"][best])]
    assert steps[0] == steps[1]
    assert set(found["curves"]["0"]) == set(found["curves"]["1"])

    # The file alone is enough to go on from: another day, another folder.
    monkeypatch.setattr(script, "TextbookRacer", None)
    sys.argv[1] = str(tmp_path / "another")
    assert script.main() == 0
    assert capsys.readouterr().out.splitlines() == tables[0]
    sys.argv[sys.argv.index("1e-2")] = "1e-4"
    with pytest.raises(
        SystemExit, match=r"race\.json is of a race with other lrs: give another one"
    ):
        script.main()

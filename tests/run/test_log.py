"""The console and the loggers: plain lines or a moving bar, one JSON line a record."""

import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from smezo_cli.run import console as log
from smezo_cli.run.console import Bar, Console, duration
from smezo_cli.run.loggers import JsonlLogger


class Clock:
    """A clock that is set by hand, in seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(log.time, "monotonic", made)
    return made


def terminal() -> tuple[Console, io.StringIO]:
    """A console that writes to a terminal of 80 columns, and what it wrote."""
    console, out = Console(), io.StringIO()
    console._rich = RichConsole(file=out, force_terminal=True, width=80, highlight=False)
    return console, out


# ----------------------------------------------------------------------------------------- console


def test_lines_go_to_the_screen_and_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was said before there was a file is on the screen alone; a second opening appends."""
    for _ in range(2):
        console = Console()
        console.say("early")
        console.keep(tmp_path / "console.log")
        console.say("one\n  two")
        console.close()
    assert (tmp_path / "console.log").read_text() == "one\n  two\none\n  two\n"
    assert capsys.readouterr().out == "early\none\n  two\n" * 2


def test_lines_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prompt's brackets are no markup, a path is not wrapped, no colours outside a terminal."""
    lines = [
        "[bold]{text}[/bold] [0, 1)",
        "runs/" + "x" * 300,
        ":smile: 1e-05 'a'",
        "naïve 中文 😀",
    ]
    console = Console()
    console.keep(tmp_path / "console.log")
    for line in lines:
        console.say(line)
    console.close()
    assert capsys.readouterr().out.splitlines() == lines
    assert (tmp_path / "console.log").read_text(encoding="utf-8").splitlines() == lines


# --------------------------------------------------------------------------------------------- bar


def test_without_a_terminal_a_bar_is_a_line_every_ten_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps done of all, what was noted, steps a second since this start, time left; no codes."""
    with Console().bar("train", total=100, done=20) as bar:
        for i in range(30):  # a step a second
            clock.now += 1.0
            bar.step(1, f"loss {i}")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "  train 30/100  loss 9  1.00/s  1 min 10 s left",
        "  train 40/100  loss 19  1.00/s  1 min 0 s left",
        "  train 50/100  loss 29  1.00/s  50 s left",
    ]


def test_a_short_bar_says_nothing_without_a_terminal(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three seconds need no progress report."""
    with Console().bar("dev", total=3) as bar:
        for _ in range(3):
            clock.now += 1.0
            bar.step(1)
    assert capsys.readouterr().out == ""


def test_a_bar_moves_on_a_terminal_and_is_gone_afterwards(clock: Clock) -> None:
    """Title, count and note; lines said meanwhile stand; another bar inside has no place."""
    console, out = terminal()
    with console.bar("train", total=10, done=4) as outer:
        assert isinstance(outer, Bar)
        clock.now += 1.0
        outer.step(1, "loss [0.5]")
        assert console._progress is not None
        console._progress.refresh()
        with console.bar("dev", total=2) as inner:  # nothing of its own: one bar at a time
            inner.step(2)
        assert console._progress is outer._live
        console.say("step 5 [dev] 0.5")
    text = out.getvalue()
    for shown in ("train", "5/10", "loss [0.5]", "1.00/s", "5 s left", "step 5 [dev] 0.5"):
        assert shown in text
    assert console._progress is None
    assert "\x1b[?25h" in text  # the cursor is back
    console.say("after")
    assert out.getvalue().rstrip().endswith("after")


def test_a_bar_is_taken_away_when_what_it_shows_fails(clock: Clock) -> None:
    """An error inside leaves the terminal as it was and goes on."""
    console, out = terminal()
    with pytest.raises(ZeroDivisionError), console.bar("train", total=2):
        1 / 0  # noqa: B018 - an error like any other
    assert console._progress is None
    assert "\x1b[?25h" in out.getvalue()


def test_a_bar_of_nothing_done_knows_no_time_left(clock: Clock) -> None:
    """No division by zero where no time has passed or no step was made."""
    console, out = terminal()
    with console.bar("train", total=2) as bar:
        bar.step(0, "waiting")
        bar.step(1, "fast")
        assert console._progress is not None
        console._progress.refresh()
    assert "fast" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (200_000, "55 h 33 min"),
        (math.inf, "unknown"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float, words: str) -> None:
    """Rounded before they are taken apart, so never 60 s or 60 min."""
    assert duration(seconds) == words


# ------------------------------------------------------------------------------------------- jsonl


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_is_a_line_at_once(tmp_path: Path) -> None:
    """Whoever reads along, or after a SIGKILL, sees it; numbers come back to the last bit."""
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path, 0)
    record = {"step": 1, "loss": 0.1 + 0.2, "projected_grad": [-1e-30], "dev.auc": None}
    logger.log(record)
    assert lines_of(path) == [record]
    content = path.read_bytes()
    assert logger.standing() == (len(content), hashlib.sha256(content).hexdigest())
    logger.close({}, ok=True)


def test_a_resumed_run_writes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Records after the checkpoint, and a half line of a killed process, are cut off first."""
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path, 0)
    logger.log({"step": 1})
    keep = logger.standing()
    logger.log({"step": 2})
    logger.close({}, ok=False)
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    again = JsonlLogger(path, keep[0])
    assert again.standing() == keep
    again.log({"step": 2, "loss": 1.0})
    again.close({}, ok=True)
    assert lines_of(path) == [{"step": 1}, {"step": 2, "loss": 1.0}]


def test_records_that_were_lost_leave_no_hole(tmp_path: Path) -> None:
    """A file shorter than the checkpoint knew it (a power failure, a deletion) gets no NULs."""
    logger = JsonlLogger(tmp_path / "metrics.jsonl", 100)
    logger.log({"step": 9})
    logger.close({}, ok=True)
    assert lines_of(tmp_path / "metrics.jsonl") == [{"step": 9}]

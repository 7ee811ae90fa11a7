"""What shows that work goes on: a moving line on a terminal, lines elsewhere, or nothing."""

import contextlib
import io
import sys
import threading
from collections.abc import Callable

import pytest

from smezo_cli.cli.verbs import main
from smezo_cli.machine import torchrun, waiting
from smezo_cli.run.console import Console


class Clock:
    """Stands for the time module; a look passes so many seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Seconds pass by hand, and looks are taken by hand."""
    found = Clock()
    monkeypatch.setattr(waiting, "time", found)
    monkeypatch.setattr(waiting, "_watch", lambda ended: None)
    monkeypatch.setattr(waiting._shown, "spoke", 0.0)
    return found


def look(clock: Clock, seconds: float) -> None:
    clock.now += seconds
    waiting._show(waiting._shown.works[-1], clock.now)


def test_a_terminal_shows_one_line_from_two_seconds_on_and_takes_it_away(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", shown := Terminal())
    with waiting.waiting("loading it", 4) as tick:
        look(clock, 1.9)
        assert shown.getvalue() == ""
        look(clock, 0.2)
        tick(3)
        look(clock, 1)
        assert shown.getvalue() == "\r\x1b[K  loading it 0/4  2 s\r\x1b[K  loading it 3/4  3 s"
    assert shown.getvalue().endswith("\r\x1b[K")
    assert "\n" not in shown.getvalue()


def test_a_line_is_no_wider_than_its_terminal(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    monkeypatch.setattr(sys, "stdout", shown := Terminal())
    with waiting.waiting("loading it"):
        look(clock, 3)
    assert shown.getvalue() == "\r\x1b[K  loading i\r\x1b[K"


def test_elsewhere_a_line_every_ten_seconds_without_carriage_returns(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", shown := io.StringIO())
    with waiting.waiting("loading it"):
        for _ in range(25):
            look(clock, 1)
    assert shown.getvalue() == "  loading it  10 s\n  loading it  20 s\n"


def test_the_innermost_is_shown_and_a_line_of_the_console_takes_the_place_of_the_moving_one(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", shown := Terminal())
    with waiting.waiting("outer"):
        look(clock, 3)
        with waiting.waiting("inner"):
            look(clock, 3)
            Console().say("a line")
            look(clock, 1)
        look(clock, 3)
    drawn = [part.strip() for part in shown.getvalue().split("\r\x1b[K")]
    assert drawn == ["", "outer  3 s", "inner  3 s", "a line", "outer  10 s", ""]


@pytest.mark.parametrize(("verb", "has_lines"), [("plan", "err"), ("replay", "out")])
def test_where_a_verb_prints_data_the_lines_stand_beside_it(
    verb: str, has_lines: str, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--no-such-flag"]) == 2
    capsys.readouterr()
    with waiting.waiting("loading it"):
        look(clock, 11)
    said = capsys.readouterr()
    assert getattr(said, has_lines) == "  loading it  11 s\n"
    assert (said.out == "") == (has_lines == "err")


def test_a_bar_has_the_terminal_alone(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", shown := Terminal())
    with waiting.waiting("hashing"):
        with Console().bar("train", 2):
            look(clock, 3)
        look(clock, 3)
    assert shown.getvalue().count("hashing") == 1


def test_other_ranks_and_a_closed_stream_show_nothing(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", shown := io.StringIO())
    monkeypatch.setattr(torchrun, "speaker", lambda: None)
    with waiting.waiting("loading it") as tick:
        tick(1)
        assert not waiting._shown.works
    monkeypatch.undo()
    shown.close()
    monkeypatch.setattr(sys, "stdout", shown)
    with waiting.waiting("loading it"):
        waiting._show(waiting._shown.works[-1], 1e9)


def test_it_is_the_thread_that_looks_and_it_ends_with_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = threading.Event()
    show: Callable[..., None] = lambda work, now: looked.set()  # noqa: E731
    monkeypatch.setattr(waiting, "_show", show)
    monkeypatch.setattr(waiting, "_LOOK_EVERY_S", 0.001)
    before = threading.active_count()
    with contextlib.suppress(KeyboardInterrupt), waiting.waiting("loading it"):
        assert looked.wait(60)
        raise KeyboardInterrupt
    assert threading.active_count() == before
    assert not waiting._shown.works


def test_work_goes_on_where_no_thread_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    done = False
    with waiting.waiting("loading it"):
        done = True
    assert done
    assert not waiting._shown.works
    with pytest.raises(KeyError), waiting.waiting("loading it"):
        raise KeyError("of the work")

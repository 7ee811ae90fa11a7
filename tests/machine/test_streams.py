"""Standard streams that are closed, full or read by nobody; Ctrl-C while a command starts."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from smezo_cli.cli.verbs import main
from smezo_cli.machine import streams
from tests import ROOT
from tests.run.processes import smezo

LOST = "smezo: standard output cannot be written ("
TINY = (
    "model=tiny-llama task=toy task.num_train=8 task.num_dev=4 task.num_test=4 device=cpu "
    "batch_size=2 eval_every=1 steps=2 method=mezo"
)


def shell(line: str, cwd: Path, **more: str) -> tuple[int, str]:
    """Exit code of a line in which `smezo` is ours, and what it left in the file `err`."""
    smezo = f'smezo() {{ "{sys.executable}" -m smezo_cli "$@"; }}'
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    code = subprocess.run(["bash", "-c", f"{smezo}\n{line}"], cwd=cwd, env=env).returncode
    err = cwd / "err"
    return code, err.read_text() if err.exists() else ""


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("smezo {} >/dev/full 2>err", 2, LOST + "No space left on device)"),
        ("smezo {} >&- 2>err", 2, LOST + "it is closed)"),
        ("smezo {} 2>err | true; exit ${{PIPESTATUS[0]}}", 0, ""),
        ("smezo {} >/dev/null 2>&-", 0, ""),
        ("smezo {} >/dev/null 2>/dev/full", 0, ""),
        ("smezo {} <&- >/dev/null 2>err", 0, ""),
        ("smezo {} >&- <&- 2>&-", 2, ""),
        ("smezo {} >/dev/full 2>&1", 2, ""),
    ],
)
@pytest.mark.parametrize("verb", ["ls", "completion bash", "train --help", "runs --runs-dir ."])
def test_what_only_prints_ends_with_one_sentence_or_none(
    line: str, code: int, says: str, verb: str, tmp_path: Path
) -> None:
    found, err = shell(line.format(verb), tmp_path)
    assert found == code
    assert err.startswith(says)
    assert err.count("\n") == bool(says)


@pytest.mark.parametrize("verb", ["ls tsaks", "train stpes=3"])
@pytest.mark.parametrize("to", ["2>&-", "2>/dev/full", ">&- 2>&-"])
def test_a_mistake_keeps_its_exit_code(verb: str, to: str, tmp_path: Path) -> None:
    assert shell(f"smezo {verb} {to}", tmp_path)[0] == 2


def command(words: list[str]) -> int:
    """Be `smezo WORDS`, in a process that has imported most of what it needs."""
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]  # as Python has it
    sys.argv[1:] = words
    return main()


def nobody_reads() -> None:
    """Standard output is a pipe whose other end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def close_0_and_2() -> None:
    """As a shell leaves them by `<&- 2>&-`, and Python then at its start."""
    os.close(0)
    os.close(2)
    sys.stdin = sys.__stdin__ = sys.stderr = None  # type: ignore[misc, assignment]


def check_run(cwd: Path) -> None:
    """It is whole, and console.log has what nobody saw."""
    (run,) = (cwd / "runs" / "default").iterdir()
    assert json.loads((run / "result.json").read_text())["status"] == "done"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 1, 2, 2]
    assert "test accuracy" in (run / "console.log").read_text()


def test_a_run_goes_on_to_its_end_without_any_stream(tmp_path: Path) -> None:
    """No file takes the place of a closed stream."""
    assert shell(f"smezo train {TINY} <&- >&- 2>&-", tmp_path) == (0, "")
    check_run(tmp_path)


@pytest.mark.parametrize(
    ("out", "faults", "says"), [("/dev/full", [], LOST), (None, [nobody_reads], "")]
)
def test_a_run_goes_on_to_its_end(
    out: str | None, faults: list[Callable[[], None]], says: str, tmp_path: Path
) -> None:
    words = ["train", *TINY.split()]
    ended = smezo(words, tmp_path, out=out, faults=faults, program=command)
    assert ended.code == 0
    assert ended.err.startswith(says)
    assert ended.err.count("\n") == bool(says)
    check_run(tmp_path)


def test_the_jobs_of_a_sweep_go_on(tmp_path: Path) -> None:
    words = ["train", "-m", *TINY.split(), "seed=0,1"]
    ended = smezo(words, tmp_path, out="/dev/full", faults=[close_0_and_2], program=command)
    assert (ended.code, ended.err) == (0, "")
    results = list(tmp_path.glob("runs/default/*/result.json"))
    assert [json.loads(file.read_text())["status"] for file in results] == ["done"] * 2


@pytest.mark.parametrize("closed", ["0", "1", "2", "0 1 2"])
def test_a_closed_stream_is_reopened_for_children_too(closed: str, tmp_path: Path) -> None:
    script = (
        "import os, subprocess, sys; from smezo_cli.machine import streams; "
        f"found = streams.reopen_closed(); assert found == {{{closed.replace(' ', ', ')}}}, found; "
        "file = open('file', 'w'); assert file.fileno() > 2; "
        "child = 'import os; [os.fstat(n) for n in (0, 1, 2)]'; "
        "sys.exit(subprocess.run([sys.executable, '-c', child]).returncode)"
    )
    redirections = " ".join(f"{n}{'<' if n == '0' else '>'}&-" for n in closed.split())
    line = f'"{sys.executable}" -c {shlex.quote(script)} {redirections}'
    assert shell(line, tmp_path)[0] == 0


def test_text_that_an_encoding_lacks_is_escaped_and_bytes_stay(tmp_path: Path) -> None:
    script = (
        "from smezo_cli.machine import streams; streams.guard(); "
        r"print('a \u4e2d \udce9 \ud83d'); import sys; print('\u00e4', file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=True)
    assert (run.stdout, run.stderr) == (b"a \\u4e2d \xe9 \\ud83d\n", b"\\xe4\n")


def test_a_slow_reader_gets_all_of_it(tmp_path: Path) -> None:
    """A full pipe that does not block is waited for."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    script = "from smezo_cli.machine import streams; streams.guard(); print('x' * 300_000)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], env=env, stdout=writing) as child:
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            assert len(pipe.read()) == 300_001
    assert child.returncode == 0


def test_what_a_program_has_put_in_place_of_a_stream_stays() -> None:
    before = sys.stdout, sys.stderr
    assert before[0] is not sys.__stdout__  # pytest's
    streams.guard()
    assert (sys.stdout, sys.stderr) == before


# Ctrl-C arrives when Python asks for this module.
INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv[1:] = {words!r}
import runpy
runpy.run_module({start!r}, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("start", "words", "module"),
    [
        ("smezo_cli", "ls", "smezo_cli.errors"),
        ("smezo_cli", "train", "smezo_cli.train"),
        ("smezo_cli", "train", "hydra"),
        ("smezo_cli", f"train {TINY}", "torch"),
        ("smezo_cli.train", TINY, "omegaconf"),
        ("smezo_cli", "eval nowhere", "smezo_cli.cli.evaluate"),
        ("smezo_cli", "table", "yaml"),
    ],
)
def test_ctrl_c_while_libraries_are_imported_prints_nothing(
    start: str, words: str, module: str, tmp_path: Path
) -> None:
    script = INTERRUPTED.format(module=module, words=words.split(), start=start)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "")


def test_a_command_that_was_told_to_ignore_ctrl_c_does(tmp_path: Path) -> None:
    script = INTERRUPTED.format(module="smezo_cli.errors", words=["--version"], start="smezo_cli")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=env,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_paths_are_utf8_in_any_locale(tmp_path: Path) -> None:
    """A run made under an ASCII locale lies where others find it, and is printed as it is.

    C and POSIX are two names of one locale, and every command starts alike: the verbs that load
    torch are asked under one of them each.
    """
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    line = f"""LC_ALL=C smezo train {TINY} "runs_dir='räns'" name=x >/dev/null 2>err || exit
    for locale in C POSIX; do LC_ALL=$locale smezo runs --runs-dir räns >>out 2>>err || exit; done
    LC_ALL=POSIX smezo export räns/x/* "exp ä" >>out 2>>err && ls "exp ä/smezo.yaml" >/dev/null"""
    assert shell(line, tmp_path, **ascii_only) == (0, "")
    (run,) = (tmp_path / "räns" / "x").iterdir()
    assert "folder  räns/x/" in (run / "console.log").read_text(encoding="utf-8")
    config = (run / "config.yaml").read_text(encoding="utf-8")
    assert "runs_dir: räns" in config or "runs_dir: r\\xE4ns" in config
    out = (tmp_path / "out").read_text(encoding="utf-8")
    assert out.count("räns/x/") >= 2
    assert "exp ä" in out


def test_an_interpreter_that_was_told_its_encoding_is_left_alone(tmp_path: Path) -> None:
    """Else it would start itself for ever."""
    script = f'"{sys.executable}" -X utf8=0 -m smezo_cli --version >/dev/null 2>err'
    options = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    assert shell(script, tmp_path, **options) == (0, "")
    script = script.replace("-X utf8=0", "-E")
    assert shell(script, tmp_path, **options, PYTHONUTF8="0") == (0, "")


def test_what_a_program_has_printed_stays_before_what_smezo_prints() -> None:
    """Its lines may still lie in its own buffer when the streams are guarded."""
    code = "from smezo_cli.machine import streams; print('first'); streams.guard(); print('second')"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    found = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=env, check=True
    )
    assert found.stdout.decode().split() == ["first", "second"]


def test_a_program_with_a_stream_of_its_own_keeps_its_exit_code() -> None:
    code = "import io, sys; sys.stdout = io.StringIO(); from smezo_cli.machine import process; "
    code += "process.begin(); sys.exit(process.end(3))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 3

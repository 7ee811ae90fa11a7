"""Run cases in forked workers, under an alarm and a memory limit."""

import contextlib
import gc
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzz.cases import KINDS, Case, Finding, TooLong, once
from fuzz.fixtures import prepare, restore
from fuzz.hostile import VALUES

ALARM_S = 5  # of a case, in seconds of its processor
WAIT_S = 30  # of the clock: a case that waits for something, or a machine that has no time for it


MEMORY_BYTES = 3 << 30  # that a worker may map beyond what it began with


class Watch:
    """What a case did through Python that no case may do; an audit hook, which stays for ever."""

    def __init__(self, allowed: Sequence[Path]) -> None:
        self.allowed = [os.path.realpath(path) for path in allowed]
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, words: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in ("pickle.find_class", "os.system", "socket.connect", "code.__new__"):
            if event != "socket.connect" or isinstance(words[1], tuple):
                self.seen.append(f"{event} {words!r}"[:300])
        elif event == "subprocess.Popen" and os.path.basename(str(words[0])) != "git":
            self.seen.append(f"{event} {words!r}"[:300])
        elif event == "open":
            path, _mode, flags = words
            if flags & os.O_NOFOLLOW and os.path.islink(path):
                return  # it is about to fail
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if writes and isinstance(path, str | bytes | os.PathLike):
                self._check(event, path)
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.symlink"):
            self._check(event, words[1 if event == "os.symlink" else 0])
        elif event in ("os.rename", "os.link"):
            self._check(event, words[0])
            self._check(event, words[1])

    def _check(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        with contextlib.suppress(OSError, ValueError):
            real = os.path.realpath(os.fsdecode(path))
            parent = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))))
            real = os.path.join(parent, os.path.basename(real)) if event != "open" else real
            inside = any(real == top or real.startswith(top + os.sep) for top in self.allowed)
            # Where nothing is kept; the latter sets back the peak of memory (see proc(5)).
            nothing = real.startswith("/dev/") or real.endswith("/clear_refs")
            if not inside and not nothing:
                self.seen.append(f"{event} of {real}")


def snapshot(folder: Path, but: Path) -> dict[str, tuple[int, int, int]]:
    """Every path below a folder with its mode, size and time of change, less one folder's."""
    found: dict[str, tuple[int, int, int]] = {}
    for top, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if os.path.join(top, name) != str(but)]
        for name in (*files, *folders):
            status = os.lstat(os.path.join(top, name))
            size = 0 if name in folders else status.st_size
            when = 0 if name in folders else status.st_mtime_ns
            found[os.path.join(top, name)] = (status.st_mode, size, when)
    return found


def run_case(name: str, seed: int, at: int, scratch: Path, watch: Watch) -> dict[str, Any]:
    """One case in this process; its record."""
    import hydra.core.global_hydra
    import torch

    folder = scratch / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.chdir(folder)
    before = snapshot(scratch, folder)
    finding = None
    case = Case(folder, scratch / "fixtures")

    def make(data: st.DataObject) -> None:
        case.data = data
        watch.on = True
        KINDS[name].make(case)

    def alarm(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, alarm)
    signal.signal(signal.SIGPROF, alarm)
    signal.alarm(WAIT_S)
    signal.setitimer(signal.ITIMER_PROF, ALARM_S)
    start = time.process_time()
    watch.seen.clear()
    try:
        # Anything that a library would print past Python's streams goes nowhere.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            once(make, f"{seed}/{name}/{at}")
    except TooLong:
        frames = "".join(traceback.format_exc().splitlines(keepends=True)[-8:])
        finding = f"longer than {ALARM_S} s\n{frames}"
    except Finding as error:
        finding = str(error)
    except BaseException as error:
        finding = "".join(traceback.format_exception(error))[-3000:]
    finally:
        watch.on = False
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - start
    os.chdir(scratch)
    torch.set_grad_enabled(True)
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    after = snapshot(scratch, folder)
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    if changed:
        finding = f"changed outside of its folder: {changed[:5]}"
        restore(scratch)
    elif watch.seen and finding is None:
        finding = f"did what no case may: {watch.seen[:3]}"
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "kind": name,
        "case": at,
        "seconds": round(seconds, 3),
        "refused": case.refused,
        "finding": finding,
    }


def work(jobs: Sequence[tuple[str, int]], seed: int, scratch: Path, pipe: int) -> None:
    """The cases of one worker; a line to the pipe before and after each."""
    own = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY_BYTES, own + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    watch = Watch([scratch / "case", scratch / "tmp"])
    with os.fdopen(pipe, "w", encoding="utf-8", errors="backslashreplace") as out:
        for name, at in jobs:
            print(json.dumps({"kind": name, "case": at}), file=out, flush=True)
            record = run_case(name, seed, at, scratch, watch)
            print(json.dumps(record), file=out, flush=True)


def records(jobs: Sequence[tuple[str, int]], seed: int, scratch: Path) -> Iterator[dict[str, Any]]:
    """The record of every case; a worker that dies or hangs ends its case alone."""
    jobs = list(jobs)
    while jobs:
        reader, pipe = os.pipe()
        worker = os.fork()
        if not worker:
            code = 1
            try:
                os.close(reader)
                work(jobs, seed, scratch, pipe)
                code = 0
            finally:
                os._exit(code)
        os.close(pipe)
        begun: dict[str, Any] | None = None
        buffer = b""
        dead = ""
        while not dead:
            # The alarm waits for Python; what hangs below it is killed.
            ready = select.select([reader], [], [], 2 * WAIT_S)[0]
            chunk = os.read(reader, 1 << 16) if ready else b""
            if not ready:
                os.kill(worker, signal.SIGKILL)
                dead = f"longer than {2 * WAIT_S} s, below Python"
            elif not chunk:
                dead = "ended"
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                record = json.loads(line)
                if "seconds" in record:
                    begun = None
                    jobs.pop(0)
                    yield record
                else:
                    begun = record
        os.close(reader)
        status = os.waitpid(worker, 0)[1]
        if begun is not None:
            jobs.pop(0)
            how = f"{dead}: the worker ended with status {os.waitstatus_to_exitcode(status)}"
            restore(scratch)
            yield {**begun, "seconds": 0.0, "refused": False, "finding": how}
        elif jobs and dead != "ended":
            raise SystemExit("fuzz: a worker hung between two cases.")


def planned(cases: int, kinds: Sequence[str]) -> list[tuple[str, int]]:
    """So many cases of the kinds, by their shares, at least one of each, in turns."""
    total = sum(KINDS[name].share for name in kinds)
    counts = {name: max(1, round(cases * KINDS[name].share / total)) for name in kinds}
    jobs = [(name, at) for name, count in counts.items() for at in range(count)]
    return sorted(jobs, key=lambda job: (job[1] / counts[job[0]], job[0]))


def fuzz(
    cases: int,
    seed: int,
    kinds: Sequence[str] = (),
    only: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Records of so many cases: kind, case, seconds, refused, and finding (None for none)."""
    kinds = list(kinds) or list(KINDS)
    before = Path.cwd()
    environment = dict(os.environ)
    scratch = Path(tempfile.mkdtemp(prefix="smezo-fuzz-")).resolve()
    names = {"HOME": "home", "SMEZO_CACHE": "cache", "HF_HOME": "home/hf", "TMPDIR": "tmp"}
    names["HYPOTHESIS_STORAGE_DIRECTORY"] = "home/hypothesis"
    os.environ |= {name: str(scratch / folder) for name, folder in names.items()}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline"}
    found = []
    sys.dont_write_bytecode = True
    try:
        # A worker is forked with all that is slow to import.
        import datasets  # noqa: F401
        import matplotlib.font_manager  # noqa: F401  # which writes its cache once, below HOME
        import pyarrow.parquet  # noqa: F401

        prepare(scratch)
        once(lambda data: data.draw(VALUES), "")  # it writes a table of characters the first time
        jobs = planned(cases, kinds) if only is None else [(kinds[0], only)]
        # A collection in a worker would write to every object of this process, and so copy them.
        gc.collect()
        gc.freeze()
        for record in records(jobs, seed, scratch):
            found.append(record)
            if record["finding"] is not None:
                say(f"{record['kind']} {record['case']}: {record['finding']}")
            if len(found) % 1000 == 0:
                say(f"{len(found)} of {len(jobs)} cases")
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ |= environment
        shutil.rmtree(scratch, ignore_errors=True)
    return found

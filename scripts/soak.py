"""Faults by the hundred in real runs of tiny models; afterwards the same command, the same bits.

    python scripts/soak.py --faults 500 --seed 0 --json soak.json
    python scripts/soak.py --kills 200 --seed 0 --json kills.json

A trial is a run that suffers some faults one after the other, each in a process of its own, and is
then given its command again until it ends. (A fault that comes too late is counted as missed, and a
file of the finished run is harmed in its place.) It is lost if it does not end, and different if
weights, metrics (but seconds), scores, predictions, settings or results (but clocks) are not those
of a run that was never disturbed. Processes are forked from this one, which has imported all and
computes nothing (so has no threads): Python and torch start once, not five hundred times.

With --kills a trial is a run of any method, with any keep and full_save_every, that is killed or
stopped at a place drawn from all that it comes by: losses, batches of an evaluation, files that are
written, synced, renamed and removed. Resumed, it is killed again, up to five times. Afterwards its
folder must hold the files of a run that was never disturbed, and no other.

Nothing of this is in the product: a child patches functions in itself.
"""

import argparse
import collections
import errno
import functools
import gc
import json
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama
import transformers.models.opt.modeling_opt  # noqa: F401 - what children would import

import smezo_cli.cli.evaluate
import smezo_cli.cli.export
import smezo_cli.cli.predict
import smezo_cli.cli.replay  # noqa: F401 - as above
from smezo_cli.cli.verbs import main as smezo
from smezo_cli.config.compose import compose
from smezo_cli.methods import mezo, sparse_mezo  # noqa: F401 - as above
from smezo_cli.run import best, evaluate, loaded, replay, session  # noqa: F401
from smezo_cli.scoring import scorer
from smezo_cli.store import saved, trajectory
from smezo_cli.zo import optimizer

COMMON = (
    "train task=toy task.num_train=32 task.num_dev=16 task.num_test=24 task.prompt=0 device=cpu "
    "steps=12 batch_size=4 eval_every=3 compile=false method.executor={} lr=1e-3"
)
RUNS = [
    f"{COMMON.format('sequential')} model=tiny-llama method=sparse_mezo sparsity=0.6 "
    "method.mask_refresh_every=5 full_save_every=4",
    f"{COMMON.format('lockstep')} model=tiny-opt method=mezo dtype=bfloat16 method.num_queries=2 "
    "method.rounding=stochastic full_save_every=5",
    f"{COMMON.format('in_place')} model=tiny-llama method=sparse_mezo method.mask=random "
    "sparsity=0.5 keep=all method.weight_decay=0.01",
    f"{COMMON.format('sequential')} model=tiny-opt method=mezo method.noise=rademacher keep=last "
    "lr_schedule=linear full_save_every=3",
]
FILES = ["trajectory.bin", "metrics.jsonl", "scores.safetensors", "result.json", "config.yaml"]
FILES += ["checkpoint/state.json", "checkpoint/weights-*"]
PLACES: dict[str, tuple[Any, str, int]] = {  # where, and how often a whole run comes by at most
    "probe": (scorer.Scorer, "loss", 24),
    "update": (optimizer.ZeroOrder, "_apply", 12),
    "evaluation": (evaluate, "evaluate", 7),
    "write": (saved, "save_file", 10),
    "fsync": (os, "fsync", 25),
    "rename": (os, "replace", 25),
    "record": (os, "pwrite", 12),
    "load": (loaded, "load_model", 1),
    "replay": (optimizer.ZeroOrder, "replay", 8),
}
ANYWHERE: list[tuple[Any, str]] = [
    *((owner, name) for owner, name, _ in PLACES.values()),
    *((scorer.Scorer, name) for name in ("scores", "features", "generate")),
    *((os, name) for name in ("unlink", "ftruncate")),
]
_TOY = f"{COMMON.format('sequential')} task.num_dev=8 task.num_test=12"
_FIRST_ORDER = _TOY.replace(" compile=false method.executor=sequential", "")
_ASKED = (
    "train task.num_train=8 task.num_dev=8 task.num_test=12 task.prompt=0 device=cpu "
    "model=tiny-llama"
)
_ANSWERS = (
    "task=generation task.data=../own.jsonl \"task.prompt='{q}? It is'\" task.columns={answer:a} "
    "task.max_new_tokens=4"
)
_EVERY_KEEP = [f"keep={keep}" for keep in ("best", "last", "all")]
_FULL_SAVES = [f"{keep}{of}" for keep in _EVERY_KEEP for of in ("", " full_save_every=4")]
KILLED: dict[str, tuple[str, list[str]]] = {  # a command, and what may be added to it
    "mezo": (f"{_TOY} model=tiny-opt method=mezo", _FULL_SAVES),
    "sparse_mezo": (
        f"{_TOY} model=tiny-llama method=sparse_mezo sparsity=0.6 method.mask_refresh_every=5",
        _FULL_SAVES,
    ),
    "mezo_adam": (f"{_TOY} model=tiny-llama method=mezo_adam lr=1e-2", _FULL_SAVES),
    "mezo_lora": (f"{_TOY} model=tiny-llama method=mezo_lora lr=1e-2", _FULL_SAVES),
    "mezo of answers": (
        f"{_ASKED} {_ANSWERS} method=mezo lr=1e-3 steps=4 batch_size=4 eval_every=2 "
        "method.executor=sequential compile=false",
        _EVERY_KEEP,
    ),
    "adamw": (f"{_FIRST_ORDER} model=tiny-opt method=adamw lr=3e-2", _EVERY_KEEP),
    "adamw, falling lr": (
        f"{_FIRST_ORDER} model=tiny-opt method=adamw lr=3e-2 lr_schedule=linear",
        _EVERY_KEEP,
    ),
    "lora": (f"{_FIRST_ORDER} model=tiny-llama method=lora lr=1e-2", _EVERY_KEEP),
    "zero_shot": (f"{_ASKED} task=toy method=zero_shot", [""]),
    "icl": (f"{_ASKED} task=toy method=icl method.num_demonstrations=2", [""]),
    "linear_probe": (f"{_ASKED} task=toy method=linear_probe", [""]),
}
Patch = Callable[[], None]


def at(place: str, number: int, do: Callable[[], None]) -> Patch:
    """Do something at the n-th call of a function, before it."""

    def install() -> None:
        owner, name, _ = PLACES[place]
        real, count = getattr(owner, name), [0]

        def counted(*words: Any, **keywords: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                do()
            return real(*words, **keywords)

        setattr(owner, name, counted)

    return install


def anywhere(
    number: int, do: Callable[[], None], tally: Path | None = None, at_end: bool = False
) -> Patch:
    """Do something at the n-th call of all the functions in `ANYWHERE`; write how many came by.

    With `at_end` they are counted from where all is scored, and only the result is to be written.
    """

    def install() -> None:
        count = [-(10**9) if at_end else 0]
        report = best.report

        def ending(*words: Any) -> Any:
            if at_end:
                count[0] = 0
            return report(*words)

        setattr(best, "report", ending)  # noqa: B010 - mypy knows its type

        def counted(real: Callable[..., Any], *words: Any, **keywords: Any) -> Any:
            count[0] += 1
            if tally is not None:
                tally.write_text(str(count[0]))
            if count[0] == number:
                do()
            return real(*words, **keywords)

        for owner, name in ANYWHERE:
            real = getattr(owner, name)
            wrapped = functools.partial(counted, real)
            # A method needs a function, which binds.
            setattr(owner, name, functools.wraps(real)(lambda *a, f=wrapped, **k: f(*a, **k)))

    return install


def send(number: signal.Signals) -> Callable[[], None]:
    """A signal to this process itself."""
    return lambda: os.kill(os.getpid(), number)


def fail(code: int) -> Callable[[], None]:
    """An error of the system."""

    def raise_() -> None:
        raise OSError(code, os.strerror(code))

    return raise_


def small_files(size: int) -> Patch:
    """No file may grow beyond a size, as on a disk that is full: short writes, then errors."""

    def install() -> None:
        for number in (1, 2):  # our log is a file, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return install


def read_only() -> None:
    """Whatever would write fails, also for root."""
    for name in ("replace", "pwrite", "ftruncate", "unlink", "mkdir"):
        setattr(os, name, lambda *_, **__: fail(errno.EROFS)())
    real = Path.open

    def only_to_read(self: Path, mode: str = "r", *words: Any, **keywords: Any) -> Any:
        if set(mode) & set("wax+"):
            fail(errno.EROFS)()
        return real(self, mode, *words, **keywords)

    setattr(Path, "open", only_to_read)  # noqa: B010 - mypy knows its type


def jumping_clock(seed: int) -> Patch:
    """Every clock jumps, by hours and in both directions."""

    def install() -> None:
        rng = random.Random(seed)
        for name in ("time", "perf_counter", "monotonic"):
            real = getattr(time, name)
            setattr(time, name, lambda real=real: real() + rng.uniform(-1e5, 1e5))

    return install


def started(words: list[str], folder: Path, log: Path, patch: Patch | None = None) -> int:
    """`smezo WORDS` in the folder, in a process of its own; its number."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(folder)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if patch is not None:
            patch()
        code = smezo(words)
        sys.stdout.flush()
    except BaseException as error:
        os.write(2, f"Traceback: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Exit code, or minus the signal's number."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


_CLOCKS = ("started", "ended", "train_seconds", "peak_memory_bytes", "sha256")
_OF_METRICS = ("metrics_bytes", "metrics_sha256")  # its lines have seconds in them


def left(folder: Path) -> dict[str, Any]:
    """What a finished run left, without clocks."""
    (run,) = (path for path in (folder / "runs" / "default").iterdir() if path.is_dir())
    result = json.loads((run / "result.json").read_text())
    for name in _CLOCKS:
        del result[name]
    state = json.loads((run / "checkpoint/state.json").read_text())
    for name in (*_CLOCKS[2:], *_OF_METRICS):
        del state[name]
    del result["versions"]["commit"]  # who works on the checkout meanwhile changes it
    lines = (run / "metrics.jsonl").read_text().splitlines()
    metrics = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    found = {"result": result, "metrics": metrics, "state": state}
    found["files"] = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    for path in [*run.glob("checkpoint/*.safetensors"), *run.glob("scores*"), *run.glob("pred*")]:
        found[path.name] = path.read_bytes()
    found["config"] = (run / "config.yaml").read_bytes()
    if (run / "trajectory.bin").exists():
        steps = trajectory.read(run / "trajectory.bin")
        found["steps"] = steps.columns(len(steps)).tobytes()
    return found


class Trial:
    """One run, its faults, its end."""

    def __init__(self, folder: Path, line: str, seconds: float, rng: random.Random) -> None:
        self.folder, self.words, self.seconds, self.rng = folder, shlex.split(line), seconds, rng
        self.log = folder / "log"
        folder.mkdir()

    def run(self, patch: Patch | None = None) -> int:
        """The command once; its exit code."""
        return ended(started(self.words, self.folder, self.log, patch))

    def signal_after_a_while(self, number: signal.Signals) -> int:
        child = started(self.words, self.folder, self.log)
        time.sleep(self.rng.uniform(0.02, self.seconds))
        os.kill(child, number)
        return ended(child)

    def signal_at(self, place: str, number: signal.Signals) -> int:
        return self.run(at(place, self.rng.randint(1, PLACES[place][2]), send(number)))

    def two_processes(self) -> int:
        """The second is refused, naming the first, which then goes on or is killed."""
        stop = at("probe", self.rng.randint(1, 20), send(signal.SIGSTOP))
        first = started(self.words, self.folder, self.log, stop)
        _, status = os.waitpid(first, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status)
        refusal = self.folder / "second"
        second = ended(started(self.words, self.folder, refusal))
        os.kill(first, signal.SIGCONT if self.rng.random() < 0.5 else signal.SIGKILL)
        code = ended(first)
        named = f"in use by process {first};" in refusal.read_text()
        refusal.unlink()
        return code if second == 2 and named else 71

    def harm(self, how: str) -> int:
        """Cut, empty, flip or remove a file between two starts."""
        found = [p for f in FILES for p in self.folder.glob(f"runs/default/*/{f}") if p.is_file()]
        if not found:
            return self.signal_at("update", signal.SIGKILL)
        path = self.rng.choice(found)
        content = bytearray(path.read_bytes())
        if how == "truncated":
            del content[self.rng.randrange(len(content) + 1) :]
        elif content:
            for _ in range(self.rng.choice([1, 1, 1, 8])):
                content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        path.write_bytes(content)
        return 0

    def export(self) -> int:
        """The run is finished, and an export of it is killed; the same export then succeeds."""
        if (code := self.run()) != 0:
            return code
        (run,) = (path for path in (self.folder / "runs/default").iterdir() if path.is_dir())
        delta = ["--delta"] if self.rng.random() < 0.5 else []
        words = ["export", str(run), "exported", *delta]
        place = self.rng.choice(["rename", "fsync", "load"])
        kill = at(place, 1, send(self.rng.choice([signal.SIGKILL, signal.SIGINT])))
        ended(started(words, self.folder, self.log, kill))
        target = self.folder / "exported"
        code = 0 if target.exists() else ended(started(words, self.folder, self.log))
        if code == 0 and delta:
            again = ["replay", str(target), "--split", "none"]
            code = ended(started(again, self.folder, self.log))
        for path in self.folder.glob("*exported*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return code


def kinds() -> dict[str, Callable[[Trial], int]]:
    """What may happen, by name."""
    found: dict[str, Callable[[Trial], int]] = {
        "SIGKILL after a while": lambda t: t.signal_after_a_while(signal.SIGKILL),
        "SIGINT after a while": lambda t: t.signal_after_a_while(signal.SIGINT),
        "file truncated": lambda t: t.harm("truncated"),
        "bits flipped": lambda t: t.harm("flipped"),
        "disk full (short writes)": lambda t: t.run(
            small_files(int(10 ** t.rng.uniform(1.5, 5.3)))
        ),
        "disk full (record)": lambda t: t.run(
            at("record", t.rng.randint(1, 12), fail(errno.ENOSPC))
        ),
        "disk full (fsync)": lambda t: t.run(at("fsync", t.rng.randint(1, 20), fail(errno.ENOSPC))),
        "read-only": lambda t: t.run(read_only),
        "two processes": Trial.two_processes,
        "clock jumps": lambda t: t.run(jumping_clock(t.rng.randrange(2**32))),
        "export killed": Trial.export,
    }
    for place in PLACES:
        for number in (signal.SIGKILL, signal.SIGINT):
            found[f"{number.name} at {place}"] = functools.partial(
                Trial.signal_at, place=place, number=number
            )
    return found


EXPECTED = {0, 2, 130, -signal.SIGKILL}  # done (the fault never came), refused in words, stopped


def soak(faults: int, seed: int, work: Path) -> dict[str, Any]:
    """So many faults; counts by kind, and what went wrong."""
    rng, possible = random.Random(seed), kinds()
    wanted: list[tuple[Any, float]] = []
    for k, line in enumerate(RUNS):
        whole = Trial(work / f"whole-{k}", line, 0, rng)
        start = time.perf_counter()
        if whole.run() != 0:
            raise SystemExit(f"the undisturbed run failed:\n{whole.log.read_text()}")
        wanted.append((left(whole.folder), time.perf_counter() - start))
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in possible}
    wrong: list[str] = []
    start, done, order = time.perf_counter(), 0, list[str]()
    number = lost = different = 0
    while done < faults:
        k = number % len(RUNS)
        trial = Trial(work / f"trial-{number}", RUNS[k], wanted[k][1], rng)
        suffered: list[str] = []
        for _ in range(min(rng.randint(2, 6), faults - done)):
            if not order:  # every kind in turn, so that none is left out by chance
                order = rng.sample(list(possible), len(possible))
            name = order.pop()
            code = possible[name](trial)
            if code == 0 and name.startswith(("SIG", "disk", "read-only")):
                counts[name]["missed"] += 1  # it would have come after the end
                name = rng.choice(["file truncated", "bits flipped"])
                code = possible[name](trial)
            suffered.append(f"{name} ({code})")
            done += 1
            counts[name]["faults"] += 1
            if code not in EXPECTED or "Traceback" in trial.log.read_text():
                counts[name]["unclean"] += 1
                said = trial.log.read_text()
                shown = said[said.find("Traceback") :][:900] if "Traceback" in said else said[-600:]
                wrong.append(f"trial {number}: {suffered}: {shown}")
                trial.log.write_text("")
        code = trial.run()
        try:
            bad = [] if code else differing(wanted[k][0], left(trial.folder))
        except Exception as error:  # whatever a damaged folder raises here, the run is not right
            bad = [f"{type(error).__name__}: {error}"]
        lost += code != 0
        different += bool(bad)
        if code or bad:
            for name in {text.rpartition(" (")[0] for text in suffered}:
                counts[name]["lost" if code else "different"] += 1
            tail = trial.log.read_text()[-900:]
            wrong.append(f"trial {number}, run {k}: {suffered}: exit {code}, {bad}: {tail}")
        else:
            shutil.rmtree(trial.folder)
        number += 1
    return {
        **{"faults": done, "runs": number, "lost": lost, "different": different},
        **{"seconds": time.perf_counter() - start, "seed": seed, "torch": torch.__version__},
        "kinds": {name: dict(count) for name, count in counts.items() if count},
        "wrong": wrong,
    }


def kills(number: int, seed: int, work: Path) -> dict[str, Any]:
    """So many kills and stops in runs of all methods; counts by method, and what went wrong."""
    rng = random.Random(seed)
    (work / "own.jsonl").write_text(
        "".join(json.dumps({"q": f"what is {i}", "a": f"one {i % 3}"}) + "\n" for i in range(40))
    )
    # Tiny rows would make one batch.
    scorer.EVAL_TOKENS, scorer.EVAL_ANSWERS = 128, 4
    whole: dict[str, tuple[dict[str, Any], int]] = {}
    counts: dict[str, collections.Counter[str]] = {}
    wrong: list[str] = []
    order = list[str]()
    start, done, trials, lost, different = time.perf_counter(), 0, 0, 0, 0
    while done < number:
        if not order:  # every method in turn
            order = rng.sample(list(KILLED), len(KILLED))
        name = order.pop()
        line = f"{KILLED[name][0]} {rng.choice(KILLED[name][1])}"
        count = counts.setdefault(name, collections.Counter())
        if line not in whole:
            first, tally = Trial(work / f"whole-{len(whole)}", line, 0, rng), work / "tally"
            if first.run(anywhere(-1, lambda: None, tally)) != 0:
                raise SystemExit(f"the undisturbed run failed:\n{first.log.read_text()}")
            whole[line] = left(first.folder), int(tally.read_text())
            shutil.rmtree(first.folder)
        wanted, events = whole[line]
        trial = Trial(work / f"trial-{trials}", line, 0, rng)
        suffered: list[str] = []
        for _ in range(min(rng.randint(1, 5), number - done)):
            at_end = rng.random() < 0.4
            place = rng.randint(1, 30 if at_end else rng.choice([30, events]))
            sent = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            code = trial.run(anywhere(place, send(sent), at_end=at_end))
            where = "of the end" if at_end else f"of {events}"
            suffered.append(f"{sent.name} at {place} {where} ({code})")
            if code == 0:  # it would have come after the end
                count["missed"] += 1
                break
            done += 1
            count["faults"] += 1
            if code not in EXPECTED or "Traceback" in trial.log.read_text():
                count["unclean"] += 1
                wrong.append(f"trial {trials}, {line}: {suffered}: {trial.log.read_text()[-600:]}")
                trial.log.write_text("")
        code = trial.run()
        try:
            bad = [] if code else differing(wanted, left(trial.folder))
        except Exception as error:  # whatever a damaged folder raises here, the run is not right
            bad = [f"{type(error).__name__}: {error}"]
        count["lost"] += code != 0
        count["different"] += bool(bad)
        lost += code != 0
        different += bool(bad)
        if code or bad:
            tail = trial.log.read_text()[-900:]
            wrong.append(f"trial {trials}, {line}: {suffered}: exit {code}, {bad}: {tail}")
        shutil.rmtree(trial.folder)
        trials += 1
    return {
        **{"faults": done, "runs": trials, "lost": lost, "different": different},
        **{"seconds": time.perf_counter() - start, "seed": seed, "torch": torch.__version__},
        "kinds": {name: dict(count) for name, count in counts.items()},
        "wrong": wrong,
    }


def differing(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of what is not the same."""
    names = wanted.keys() | found.keys()
    return sorted(name for name in names if wanted.get(name) != found.get(name))


def table(report: dict[str, Any]) -> Iterator[str]:
    """Lines to read."""
    heads = ("faults", "missed", "unclean", "lost", "different")
    yield f"{'fault':28}" + "".join(f"{head:>10}" for head in heads)
    for name, count in report["kinds"].items():
        yield f"{name:28}" + "".join(f"{count.get(head, 0):10}" for head in heads)
    yield (
        f"{report['faults']} faults in {report['runs']} runs, {report['lost']} runs lost, "
        f"{report['different']} different, {report['seconds']:.0f} s"
    )
    yield from report["wrong"]


def main(words: Sequence[str] | None = None) -> int:
    """0 where nothing was lost, different or unclean."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--kills", type=int, help="so many kills anywhere, in place of the faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    compose(shlex.split(RUNS[0])[1:])  # Hydra's plugins and its parser's tables are made here, once
    # A collection in a child would write to every object of this process, and so copy its memory.
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory(prefix="smezo-soak-") as work:
        if given.kills:
            report = kills(given.kills, given.seed, Path(work))
        else:
            report = soak(given.faults, given.seed, Path(work))
    print("\n".join(table(report)))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())

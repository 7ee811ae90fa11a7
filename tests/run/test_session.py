"""Whole runs, as the command line starts them: to the end, killed, stopped, refused, side by side.

Every run is a process of its own, forked from one that has torch imported already.
"""

import functools
import itertools
import json
import math
import multiprocessing
import os
import pty
import random
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from smezo_cli import train
from smezo_cli.models.load import load_model
from smezo_cli.run import best, closing, evaluate, loaded, numerics
from smezo_cli.run import method as building
from smezo_cli.scoring import metrics
from smezo_cli.scoring import scorer as scoring
from smezo_cli.scoring.candidates import encode
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.store.notes import Notes
from smezo_cli.store.partial_scores import NAME
from smezo_cli.tasks import load_task
from smezo_cli.zo.directions import dense
from tests import ROOT

SMALL = ["task=toy", "task.num_train=32", "task.num_dev=16", "task.num_test=24", "device=cpu"]
BATCH_SIZE = 4
SHORT = ["steps=12", f"batch_size={BATCH_SIZE}", "eval_every=3"]
# The step sizes make weights and losses move; thresholds that are renewed are part of the state.
# executor=auto would measure by losses of its own, and faults come at the n-th loss.
_SEQUENTIAL = "method.executor=sequential"
METHODS = {
    "mezo": ["model=tiny-opt", "method=mezo", "lr=1e-3", _SEQUENTIAL],
    "sparse_mezo": [
        *("model=tiny-llama", "method=sparse_mezo", "lr=1e-3", _SEQUENTIAL),
        *("sparsity=0.6", "method.mask_refresh_every=5"),
    ],
    "mezo_adam": [
        *("model=tiny-llama", "method=mezo_adam", "lr=1e-2", _SEQUENTIAL),
        "full_save_every=5",
    ],
    # So large a step that the best look is not the last.
    "adamw": ["model=tiny-opt", "method=adamw", "lr=3e-2"],
    "sgd": ["model=tiny-llama", "method=sgd", "lr=1e-2", "method.optimizer.momentum=0.9"],
}
EXACT = ["sparse_mezo", "mezo_adam", "adamw"]  # the methods that are killed and stopped

# -------------------------------------------------------------------- a run in a process of its own


def ctrl_c_with_tee() -> None:
    """Ctrl-C ends `smezo train | tee log` at both ends: who reads our output is gone too."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.kill(os.getpid(), signal.SIGINT)


@dataclass(frozen=True)
class Fault:
    """Send this process a signal (or do something else to it) when `event` happens so often."""

    event: str
    number: int
    action: signal.Signals | Callable[[], None]

    def install(self) -> None:
        """Wrap what makes the event; "any" counts all of them together."""
        loss = Scorer.loss
        places: dict[str, list[tuple[Any, str]]] = {
            "loss": [(Scorer, "loss")],  # inside a probe, or a first-order step
            "load": [(loaded, "load_model")],
            "evaluate": [(evaluate, "evaluate")],
            "rename": [(os, "replace")],  # a file takes its place
            "nan": [(Scorer, "loss")],
            "noise": [(numerics, "loss_noise")],
            "end": [(os, "replace"), (os, "unlink")],  # from where a result is to be written
        }
        places["any"] = [*places["loss"], *places["evaluate"], *places["rename"]]
        count = itertools.count(1)
        is_end = self.event != "end"

        def ending(real: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any) -> Any:
                nonlocal is_end
                is_end = True
                return real(*args)

            return noted

        for module, name in ((best, "report"), (closing, "settle")):
            setattr(module, name, ending(getattr(module, name)))

        def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(real)
            def counted(*args: Any, **keywords: Any) -> Any:
                if real is loss and len(args[1]) != BATCH_SIZE:  # the self-check takes two rows
                    return real(*args, **keywords)
                struck = is_end and next(count) == self.number
                if self.event == "nan":
                    return real(*args, **keywords) * (math.nan if struck else 1)
                if struck and callable(self.action):
                    self.action()
                elif struck:
                    os.kill(os.getpid(), self.action)
                return real(*args, **keywords)

            return counted

        for owner, name in places[self.event]:
            setattr(owner, name, wrap(getattr(owner, name)))


def count_batches(number: float = math.inf, action: signal.Signals = signal.SIGTERM) -> None:
    """Evaluate a few rows at a time; note each batch in a file; send a signal at the n-th of them.

    The batches are those of scores, of hidden states and of answers, together.
    """
    scoring.EVAL_TOKENS, scoring.EVAL_ANSWERS = 96, 4
    count = itertools.count(1)

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **keywords: Any) -> Any:
            for found in real(*args, **keywords):
                with Path("batches").open("a") as file:
                    file.write(f"{real.__name__} {len(found[0])}\n")
                if next(count) == number:
                    os.kill(os.getpid(), action)
                yield found

        return counted

    for name in ("score_all", "features_all", "generate_all"):
        setattr(Scorer, name, wrap(getattr(Scorer, name)))


def _child(
    words: Sequence[str],
    cwd: Path,
    out: str,
    err: str,
    env: Mapping[str, str],
    faults: Sequence[Callable[[], None]],
) -> None:
    os.chdir(cwd)
    os.environ.update(env)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOCTTY), number)
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115 - for good
    sys.stderr = open(2, "w", closefd=False, encoding="utf-8", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)  # the same sums in every process, and no waiting for other cores
    for fault in faults:
        fault()
    sys.exit(train.main(list(words)))


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    modules = ("run.session", "run.loaded", "run.loop", "models.load", "methods.sparse_mezo")
    context.set_forkserver_preload(
        [
            *(
                "pytest",
                "hydra._internal.hydra",
                "hydra.core.plugins",
            ),
            *(f"smezo_cli.{name}" for name in modules),
            "smezo_cli.methods.first_order",
            *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "opt")),
        ]
    )
    return context


@dataclass
class Ended:
    """What a process left."""

    code: int
    out: str
    err: str


def until(condition: Callable[[], object], seconds: float = 300) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


class Started:
    """A run under way in `cwd`; also a context that leaves no process behind."""

    def __init__(
        self,
        words: Sequence[str],
        cwd: Path,
        *,
        out: str | None = None,
        env: Mapping[str, str] | None = None,
        faults: Sequence[Callable[[], None]] = (),
    ) -> None:
        cwd.mkdir(parents=True, exist_ok=True)
        number = len(list(cwd.glob("*.err")))
        self._paths = out or str(cwd / f"{number}.out"), str(cwd / f"{number}.err")
        self._process = _context().Process(
            target=_child, args=(list(words), cwd, *self._paths, dict(env or {}), list(faults))
        )
        self._process.start()
        self.pid: int = self._process.pid

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> int:
        """SIGKILL, unless it ended already; the exit code."""
        self._process.kill()
        self._process.join()
        return int(self._process.exitcode)

    @property
    def alive(self) -> bool:
        return bool(self._process.is_alive())

    def wait(self, seconds: float = 300) -> Ended:
        """Wait for the end."""
        self._process.join(seconds)
        assert not self.alive, "the run hangs"
        texts = [Path(p).read_text() if Path(p).is_file() else "" for p in self._paths]
        return Ended(self._process.exitcode, *texts)


def smezo(words: Sequence[str], cwd: Path, **keywords: Any) -> Ended:
    """`smezo train WORDS` in the folder `cwd`, to its end."""
    with Started(words, cwd, **keywords) as started:
        return started.wait()


def words_of(method: str, *more: str) -> list[str]:
    return [*SMALL, *SHORT, *METHODS[method], *more]


def run_folder(cwd: Path, name: str = "default") -> Path:
    """The one run folder in cwd/runs/name."""
    (found,) = (path for path in (cwd / "runs" / name).iterdir() if path.is_dir())
    return found


def result_of(folder: Path) -> dict[str, Any]:
    loaded = json.loads((folder / "result.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


def state_of(folder: Path) -> dict[str, Any]:
    loaded = json.loads((folder / "checkpoint" / "state.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


def records_of(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without seconds."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


CLOCKS_AND_BYTES = {"started", "ended", "train_seconds", "peak_memory_bytes", "command", "sha256"}
OF_METRICS = {"metrics_bytes", "metrics_sha256"}  # its lines have seconds in them


def assert_same_run(folder: Path, other: Path) -> None:
    """The same files; weights, scores and metrics bit for bit, all of the result but clocks."""
    names = [{str(p.relative_to(of)) for p in of.rglob("*")} for of in (folder, other)]
    assert names[0] == names[1]
    for pattern in ("checkpoint/*.safetensors", "scores.safetensors"):
        files, others = (sorted(path.glob(pattern)) for path in (folder, other))
        assert [path.name for path in files] == [path.name for path in others]
        assert files or "icl" in folder.name
        for mine, theirs in zip(files, others, strict=True):
            assert mine.read_bytes() == theirs.read_bytes(), mine.name
    assert records_of(folder) == records_of(other)
    results = [
        {k: v for k, v in result_of(path).items() if k not in CLOCKS_AND_BYTES}
        for path in (folder, other)
    ]
    assert results[0] == results[1]
    states = [
        {k: v for k, v in state_of(path).items() if k not in (*CLOCKS_AND_BYTES, *OF_METRICS)}
        for path in (folder, other)
    ]
    assert states[0] == states[1]


def sentence_of(ended: Ended) -> str:
    """The one sentence on stderr of a refused command."""
    assert ended.code == 2, ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("smezo: ")
    return ended.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder in which a method's run was never stopped."""

    @functools.cache
    def of(method: str) -> Path:
        cwd = tmp_path_factory.mktemp(method)
        ended = smezo(words_of(method), cwd)
        assert ended.code == 0, ended.err
        assert ended.err == ""
        return cwd

    return of


# -------------------------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_to_a_result(finished: Callable[[str], Path], method: str) -> None:
    """result.json has all that a reader of a table must know, and the run folder all the rest."""
    folder = run_folder(finished(method))
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "console.log", "result.json", "scores.safetensors"),
        *("checkpoint", ".lock", "predictions-test.jsonl"),
        *(["trajectory.bin"] if "mezo" in method else []),
    }
    result = result_of(folder)
    steps, forwards = 12, 24 if "mezo" in method else 12
    assert result["status"] == "done"
    assert result["error"] is None
    assert type(result["schema"]) is int
    assert result["test"]["n"] == 24
    for name in ("test", "zero_shot", "zero_shot_calibrated"):
        assert 0 <= result[name]["accuracy"] <= 1
        assert 0 <= result[name]["auc"] <= 1
        assert math.isfinite(result[name]["loss"])
    assert result["step"] == result["steps"] == steps
    assert result["num_forwards"] == forwards
    assert result["train_seconds"] > 0
    assert 2**25 < result["peak_memory_bytes"] < 2**34
    assert (result["seed"], result["data_seed"], result["dtype"]) == (0, 0, "float32")
    assert result["versions"]["torch"] == torch.__version__
    assert result["command"] == f"smezo train {shlex.join(words_of(method))}"
    sparsity = result["sparsity"]
    if method == "sparse_mezo":
        # Of 37,000 weights in tensors of thousands: ties and constant gains make up the rest.
        assert sparsity["requested"] == 0.6
        assert sparsity["realised"] == pytest.approx(0.6, abs=0.01)
        assert result["noise"] == "gaussian"
    else:
        assert (sparsity["requested"], sparsity["realised"]) == (None, 0)
        assert result["noise"] == ("gaussian" if "mezo" in method else None)
    config = OmegaConf.load(folder / "config.yaml")
    assert isinstance(config.method.lr if "mezo" in method else config.lr, float)
    assert (config.steps, config.task.num_dev) == (12, 16)
    assert state_of(folder)["notes"].keys() <= Notes.__annotations__.keys()


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_one_line_a_step_and_one_a_look(
    finished: Callable[[str], Path], method: str
) -> None:
    """Steps 1 to 12, looks at 3, 6, 9 and 12; the best step is the one with the lowest dev loss."""
    folder = run_folder(finished(method))
    records = records_of(folder)
    steps = [r for r in records if "loss" in r]
    looks = [r for r in records if "dev.loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert [r["step"] for r in looks] == [3, 6, 9, 12]
    assert len({r["loss"] for r in steps}) == 12
    assert all(len(r["projected_grad"]) == ("mezo" in method) for r in steps)
    best = min(looks, key=lambda r: r["dev.loss"])
    found = result_of(folder)["dev"]["best"]
    assert (found["step"], found["loss"]) == (best["step"], best["dev.loss"])
    # With weights 10 are the moments from which a longer run goes on.
    kept = {best["step"], 10} if method == "mezo_adam" else {best["step"]}
    assert {path.name for path in folder.glob("checkpoint/weights*")} == {
        f"weights-{step}.safetensors" for step in kept
    }
    assert (folder / "checkpoint/optimizer-10.safetensors").exists() == (method == "mezo_adam")


def test_the_result_is_that_of_the_saved_weights(finished: Callable[[str], Path]) -> None:
    """Figures follow from the saved scores, and those from the best weights, loaded anew."""
    folder = run_folder(finished("adamw"))
    result, scores = result_of(folder), load_file(folder / "scores.safetensors")
    cfg: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    task = load_task(cfg["task"], data_seed=0, cache=Path("/nowhere"))
    net, tokenizer = load_model(
        cfg["model"], dtype=torch.float32, device=torch.device("cpu"), cache=Path("/nowhere")
    )
    prompt = next(p for p in task.prompts if p.template == result["prompt"]["template"])
    labels = torch.tensor([row.label for row in task.test])
    scorer = Scorer(net, tokenizer)
    rows = encode(task.test, prompt, tokenizer, 256)
    before = scorer.scores(rows).detach()
    step = result["dev"]["best"]["step"]
    assert step < 12
    best = load_file(folder / f"checkpoint/weights-{step}.safetensors")
    assert not net.load_state_dict(best, strict=False).unexpected_keys
    after = scorer.scores(rows).detach()
    # Logits of size 4 in batches of another shape: the last bits differ.
    torch.testing.assert_close(scores["zero_shot"], before, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores["test"], after, rtol=0, atol=1e-5)
    assert (before - after).abs().max() > 0.01
    assert torch.equal(scores["labels"], labels)
    assert result["test"]["accuracy"] == metrics.accuracy(scores["test"], labels)
    assert result["zero_shot"]["accuracy"] == metrics.accuracy(scores["zero_shot"], labels)
    gain, error = metrics.paired_gain(
        *(metrics.correct(scores[name], labels) for name in ("test", "zero_shot"))
    )
    assert result["test"]["over_zero_shot"] == {"gain": gain, "standard_error": error}


def test_the_prompt_is_chosen_on_dev_alone(finished: Callable[[str], Path]) -> None:
    """The best calibrated zero-shot accuracy on dev, then its loss; the test set has no say."""
    folder = run_folder(finished("mezo"))
    chosen = result_of(folder)["prompt"]
    tried = state_of(folder)["notes"]["prompts"]
    assert len(tried) == 2
    key = [(p["dev_calibrated"]["accuracy"], -p["dev_calibrated"]["loss"]) for p in tried]
    assert chosen["template"] == tried[key.index(max(key))]["template"]
    assert all(p["dev"]["n"] == 16 for p in tried)


def test_the_words_of_a_run_are_plain_lines(finished: Callable[[str], Path]) -> None:
    """No escape codes in a pipe; both zero-shots, dev at a cadence, the summary; kept in a file."""
    cwd = finished("sparse_mezo")
    out = (cwd / "0.out").read_text()
    assert out == (run_folder(cwd) / "console.log").read_text()
    assert "\x1b" not in out
    assert "\r" not in out
    assert len(re.findall(r"^ +step +\d+ +dev accuracy 0\.\d+", out, re.MULTILINE)) == 4
    assert out.count("calibrated") >= 4
    summary = out[out.index("test accuracy") :]
    result = result_of(run_folder(cwd))
    for said in (
        f"{result['test']['accuracy']:.4f}",
        f"{result['zero_shot']['accuracy']:.4f}",
        f"{result['zero_shot_calibrated']['accuracy']:.4f}",
        f"{result['sparsity']['realised']:.4f}",
        *("24", "GiB", "result.json", "zero-shot", "0.6"),
    ):
        assert said in summary


def test_a_run_has_the_same_name_wherever_and_whenever(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """TASK-MODEL-METHOD-sSEED-DIGEST; neither the group nor the order of words is in the digest."""
    name = run_folder(finished("sgd")).name
    assert re.fullmatch(r"toy-tiny-llama-sgd-s0-[0-9a-f]{8}", name)
    words = words_of("sgd")[::-1]
    for more in (["name=other"], ["name=third", "seed=1"], ["name=fourth", "lr=0.02"]):
        # The name is known before the first look at the model.
        smezo([*words, *more], tmp_path, faults=[Fault("evaluate", 1, signal.SIGKILL).install])
    assert run_folder(tmp_path, "other").name == name
    assert run_folder(tmp_path, "third").name.startswith("toy-tiny-llama-sgd-s1-")
    assert run_folder(tmp_path, "fourth").name[:-8] == name[:-8]
    assert run_folder(tmp_path, "fourth").name != name


# ------------------------------------------------------------------------------- the same run again


def no_model() -> None:
    """From here on, loading a model is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    loaded.load_model = refuse  # type: ignore[assignment]  # in a child process of its own


def test_a_finished_run_is_skipped_in_one_line(finished: Callable[[str], Path]) -> None:
    """Exit code 0, one line, no model loaded, nothing written."""
    cwd = finished("mezo")
    folder = run_folder(cwd)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    ended = smezo(words_of("mezo"), cwd, faults=[no_model])
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count("\n") == 1
    assert folder.name in ended.out
    assert f"{result_of(folder)['test']['accuracy']:.4f}" in ended.out
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"} == before


def test_if_exists_says_what_becomes_of_an_old_run(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """error refuses it and leaves it; fresh does it again, to the same numbers."""
    cwd = finished("mezo")
    assert "if_exists=fresh" in sentence_of(smezo(words_of("mezo", "if_exists=error"), cwd))
    words = words_of("mezo")
    assert smezo([*words, "if_exists=error"], tmp_path).code == 0  # there was none
    folder = run_folder(tmp_path)
    (folder / "checkpoint" / "weights-99.safetensors").touch()
    (folder / "old").touch()
    assert smezo([*words, "if_exists=fresh"], tmp_path).code == 0
    assert not (folder / "old").exists()
    assert (folder / "console.log").read_text().count("test accuracy") == 1
    assert_same_run(folder, run_folder(cwd))


# ---------------------------------------------------------------------------------- killed, stopped


@pytest.mark.parametrize(("method", "seed"), [*((m, m) for m in EXACT), ("mezo", "lozo")])
def test_a_run_killed_anywhere_and_started_again_is_one_never_killed(
    finished: Callable[[str], Path], tmp_path: Path, method: str, seed: str
) -> None:
    """SIGKILL in probes, looks and writes, the places drawn: the end is the same bit for bit.

    Many more: python scripts/soak.py --kills 200.
    """
    rng = random.Random(seed)
    kills = 0
    while True:
        # Some 14 events lie between a start and its first checkpoint.
        fault = Fault("any", rng.randint(3, 20) if kills < 8 else 10**6, signal.SIGKILL)
        ended = smezo(words_of(method), tmp_path, faults=[fault.install])
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.err
        kills += 1
        # What the system had not written when the power went.
        with (run_folder(tmp_path) / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9')
    assert kills >= 4
    assert_same_run(run_folder(tmp_path), run_folder(finished(method)))


@pytest.mark.parametrize("method", ["mezo", "adamw"])
def test_a_run_killed_behind_its_result_leaves_nothing_that_is_to_go(
    finished: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    """SIGKILL at every file that is renamed or removed from where all is scored on."""
    kills, done = 0, 0
    while True:
        fault = Fault("end", kills - done + 1, signal.SIGKILL)
        ended = smezo(words_of(method), tmp_path, faults=[fault.install])
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.err
        kills += 1
        if not done and result_of(run_folder(tmp_path))["status"] == "done":
            done = kills  # what is left then begins anew
    assert 3 <= done < kills - 2
    assert "unsettled" not in state_of(run_folder(tmp_path))["notes"]
    assert_same_run(run_folder(tmp_path), run_folder(finished(method)))
    assert "done already" in smezo(words_of(method), tmp_path).out


def test_a_stop_between_two_looks_leaves_no_weights_of_its_own(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """keep=all keeps those of the looks, whether the run was stopped in between or not."""
    words = words_of("adamw", "keep=all")
    assert smezo(words, tmp_path / "whole").code == 0
    for losses in (1, 4, 1):  # at step 0, 4 and 4 again
        stop = Fault("loss", losses, signal.SIGTERM)
        assert smezo(words, tmp_path / "part", faults=[stop.install]).code == 130
    assert smezo(words, tmp_path / "part").code == 0
    assert_same_run(run_folder(tmp_path / "part"), run_folder(tmp_path / "whole"))


def words_said(cwd: Path) -> int:
    """Bytes in the console.log of the one run in `cwd`, if there is one."""
    return sum(path.stat().st_size for path in cwd.glob("runs/default/*/console.log"))


def has_said(words: float, started: Started, cwd: Path) -> bool:
    return words_said(cwd) > words or not started.alive


@pytest.mark.parametrize("method", EXACT)
def test_a_run_killed_from_outside_at_any_moment_is_one_never_killed(
    finished: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    """The same with a look at what it says in place of a counter: moments no test thought of."""
    rng, codes = random.Random(method), []
    all_words = words_said(finished(method))
    for _ in range(3):
        words = words_said(tmp_path) + rng.uniform(0, 0.6) * all_words
        with Started(words_of(method), tmp_path) as started:
            until(functools.partial(has_said, words, started, tmp_path))
            codes.append(started.kill())
    assert -signal.SIGKILL in codes
    assert smezo(words_of(method), tmp_path).code == 0
    assert_same_run(run_folder(tmp_path), run_folder(finished(method)))


def step_lines(folder: Path) -> int:
    return sum("loss" in record for record in records_of(folder))


@pytest.mark.parametrize("method", EXACT)
def test_a_signal_is_honoured_between_steps_and_nothing_is_lost(
    finished: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    """SIGINT and SIGTERM in zero-shot, probes, looks, writes and the test: exit code 130 each time.

    The state is saved, the printed command goes on from it, and the end is the same bit for bit.
    """
    words, steps = words_of(method), 0
    stops = [
        Fault("evaluate", 1, signal.SIGINT),  # zero-shot on dev
        Fault("evaluate", 3, signal.SIGTERM),  # zero-shot on test
        Fault("loss", 1, signal.SIGINT),  # the first probe of all
        Fault("loss", 4, signal.SIGTERM),  # for MeZO the second probe of a step
        Fault("evaluate", 1, signal.SIGINT),  # a look at dev
        Fault("rename", 4, signal.SIGTERM),  # a checkpoint is being written
        Fault("evaluate", 3, signal.SIGINT),
    ]
    for fault in stops:
        ended = smezo(words, tmp_path, faults=[fault.install])
        folder = run_folder(tmp_path)
        assert ended.code == 130, (fault, ended.out[-500:], ended.err)
        assert ended.err == ""
        assert f"{fault.action.name}: " in ended.out
        assert "Traceback" not in ended.out
        assert result_of(folder)["status"] == "stopped", fault
        printed = shlex.split(ended.out.splitlines()[-1])
        assert printed[:2] == ["smezo", "train"]
        words = printed[2:]
        # Every step that was made is saved, and no other.
        made = step_lines(folder) if (folder / "metrics.jsonl").exists() else 0
        saved = state_of(folder)["step"] if (folder / "checkpoint/state.json").exists() else 0
        assert saved == made == result_of(folder)["step"] >= steps, fault
        steps = made
    assert steps > 3
    ended = smezo(words, tmp_path)
    assert ended.code == 0, ended.err
    assert f"from step {steps}" in ended.out
    assert_same_run(run_folder(tmp_path), run_folder(finished(method)))
    assert result_of(folder)["train_seconds"] > 0


SCORED = {
    "mezo": words_of("mezo"),
    "adamw": words_of("adamw", "eval_every=6"),
    "linear_probe": [*SMALL, "model=tiny-llama", "method=linear_probe"],
    "icl": [*SMALL, "model=tiny-llama", "method=icl", "method.num_demonstrations=2"],
}


@pytest.mark.parametrize("method", SCORED)
def test_a_stop_between_two_batches_keeps_what_is_scored(tmp_path: Path, method: str) -> None:
    """In zero-shot, looks, hidden states and the test: every start is stopped at its 5th batch.

    No batch is computed twice, the end is that of a run that was never stopped.
    """
    whole, part, words = tmp_path / "whole", tmp_path / "part", SCORED[method]
    assert smezo(words, whole, faults=[count_batches]).code == 0
    stops = 0
    while True:
        before = len((part / "batches").read_text().splitlines()) if stops else 0
        ended = smezo(words, part, faults=[functools.partial(count_batches, 5)])
        if ended.code == 0:
            break
        assert (ended.code, ended.err) == (130, "")
        assert len((part / "batches").read_text().splitlines()) == before + 5
        assert "kept the scores of" in ended.out
        assert (run_folder(part) / NAME).is_file()
        stops += 1
    assert stops >= 2
    batches = [sorted((of / "batches").read_text().splitlines()) for of in (whole, part)]
    assert batches[0] == batches[1]
    assert_same_run(run_folder(part), run_folder(whole))


def test_a_stop_in_the_measurements_after_the_test_is_honoured(tmp_path: Path) -> None:
    """The loss noise of low precision; the scores of the test are kept, and the end is the same."""
    whole, part, words = tmp_path / "whole", tmp_path / "part", words_of("mezo", "dtype=bfloat16")
    assert smezo(words, whole, faults=[count_batches]).code == 0
    stop = Fault("noise", 1, signal.SIGTERM)
    ended = smezo(words, part, faults=[count_batches, stop.install])
    assert (ended.code, ended.err) == (130, "")
    assert "kept the scores of 24 rows" in ended.out
    assert smezo(words, part, faults=[count_batches]).code == 0
    batches = [(of / "batches").read_text().splitlines() for of in (whole, part)]
    assert batches[0] == batches[1]
    assert_same_run(run_folder(part), run_folder(whole))


@pytest.mark.parametrize("harm", ["flipped", "of another run"])
def test_partial_scores_that_are_not_this_runs_are_not_used(tmp_path: Path, harm: str) -> None:
    """Damaged, or of other weights: all is scored again, the file is gone at the end."""
    whole, part, words = tmp_path / "whole", tmp_path / "part", words_of("mezo")
    assert smezo(words, whole, faults=[count_batches]).code == 0
    assert smezo(words, part, faults=[functools.partial(count_batches, 3)]).code == 130
    kept = run_folder(part) / NAME
    if harm == "flipped":
        flip(kept, 0.7)
    else:
        other = words_of("mezo", "seed=1")
        stop = [functools.partial(count_batches, 3)]
        assert smezo(other, tmp_path / "other", faults=stop).code == 130
        shutil.copy(run_folder(tmp_path / "other") / NAME, kept)
    ended = smezo(words, part, faults=[count_batches])
    assert (ended.code, ended.err) == (0, "")
    assert "before the stop" not in ended.out
    assert_same_run(run_folder(part), run_folder(whole))


@pytest.mark.parametrize("choice", ["fresh", "error"])
def test_the_printed_command_goes_on_whatever_if_exists_said(tmp_path: Path, choice: str) -> None:
    """if_exists=fresh would start over and if_exists=error refuse; blanks and newlines count."""
    prompt = ["task.prompt='{text}  It\nwas'", "task.labels=[bad,good]"]
    words = words_of("mezo", f"if_exists={choice}", *prompt)
    ended = smezo(words, tmp_path, faults=[Fault("loss", 9, signal.SIGINT).install])
    assert ended.code == 130
    printed = shlex.split(ended.out[ended.out.rindex("smezo train") :])[2:]
    again = smezo(printed, tmp_path)
    assert again.code == 0, again.err
    assert "from step 5" in again.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_loads_ends_the_run(
    finished: Callable[[str], Path], tmp_path: Path, number: signal.Signals
) -> None:
    """Exit code 130 without a traceback; nothing is to be saved, the next start is a first."""
    ended = smezo(words_of("sgd"), tmp_path, faults=[Fault("load", 1, number).install])
    assert (ended.code, ended.err) == (130, "")
    assert "Traceback" not in ended.out
    assert result_of(run_folder(tmp_path))["status"] == "stopped"
    assert smezo(words_of("sgd"), tmp_path).code == 0
    assert_same_run(run_folder(tmp_path), run_folder(finished("sgd")))


def test_ctrl_c_saves_the_state_when_the_reader_of_the_output_is_gone(tmp_path: Path) -> None:
    """As Ctrl-C leaves `smezo train | tee log`; what was to be said is in console.log."""
    ended = smezo(words_of("mezo"), tmp_path, faults=[Fault("loss", 9, ctrl_c_with_tee).install])
    folder = run_folder(tmp_path)
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    assert state_of(folder)["step"] == step_lines(folder) == 5
    assert "smezo train" in (folder / "console.log").read_text().splitlines()[-1]


# ----------------------------------------------------------------------------------------- diverged


def assert_finite(folder: Path) -> None:
    for path in folder.glob("checkpoint/*.safetensors"):
        assert all(bool(torch.isfinite(t).all()) for t in load_file(path).values()), path.name
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    assert "NaN" not in (folder / "result.json").read_text()


@pytest.mark.parametrize(("method", "number"), [("sparse_mezo", 15), ("adamw", 8)])
def test_a_loss_that_is_not_finite_ends_the_run_with_advice(
    tmp_path: Path, method: str, number: int
) -> None:
    """Exit code 2, one sentence: the step, the last good checkpoint, a smaller lr to try."""
    words = words_of(method)
    faults = [Fault("nan", number, signal.SIGTERM).install]
    ended = smezo(words, tmp_path, faults=faults)
    folder = run_folder(tmp_path)
    said = sentence_of(ended)
    assert "nan" in said
    assert re.search(r"step 7\b", said)
    assert re.search(r"checkpoint is step [36]\b", said)
    assert "lr=" in said
    result = result_of(folder)
    assert result["status"] == "diverged"
    assert "nan" in result["error"]
    assert result["step"] == 7
    assert state_of(folder)["step"] == 6
    assert_finite(folder)
    # Without the fault the run goes on from there.
    assert smezo(words, tmp_path).code == 0
    assert result_of(folder)["status"] == "done"


@pytest.mark.parametrize("eval_every", [1, 4])
@pytest.mark.parametrize(("method", "lr"), [("sparse_mezo", "1e38"), ("adamw", "1e30")])
def test_a_step_size_far_too_large_leaves_no_result_and_no_ruined_checkpoint(
    tmp_path: Path, method: str, lr: str, eval_every: int
) -> None:
    """Also where dev shows it first, or the last step ruins the weights."""
    steps = {1: 5, 4: 1}[eval_every]
    words = words_of(method, f"lr={lr}", f"steps={steps}", f"eval_every={eval_every}")
    said = sentence_of(smezo(words, tmp_path))
    assert "nan" in said
    assert f"lr={float(lr):g}" in said
    folder = run_folder(tmp_path)
    assert result_of(folder)["status"] == "diverged"
    assert result_of(folder)["test"] is None
    kept = {path.name for path in folder.glob("checkpoint/weights-*")}
    assert kept == ({"weights-0.safetensors"} if method == "sparse_mezo" else set())
    assert_finite(folder)


# ------------------------------------------------------------------------------------- side by side


def test_two_runs_in_one_process_are_those_of_two(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """A sweep leaves the numbers, and the names, of runs started one by one."""
    for method in ("sparse_mezo", "adamw"):
        cwd = tmp_path / method
        ended = smezo([*words_of(method), "-m", "seed=0,1"], cwd)
        assert (ended.code, ended.err) == (0, "")
        first, second = sorted(p for p in (cwd / "runs/default").iterdir() if p.is_dir())
        assert_same_run(first, run_folder(finished(method)))
        assert smezo(words_of(method, "seed=1"), cwd / "alone").code == 0
        assert_same_run(second, run_folder(cwd / "alone"))
        assert records_of(first) != records_of(second)
        command = result_of(second)["command"]
        assert "seed=1" in command
        assert "0,1" not in command


def test_a_sweep_goes_on_after_a_refused_job(tmp_path: Path) -> None:
    """The job that cannot load its data is named with its words; the exit code is 2."""
    words = [*words_of("sgd"), "steps=1", "-m", "task.num_dev=9999,16"]
    ended = smezo(words, tmp_path)
    assert "task.num_dev=9999" in sentence_of(ended)
    statuses = {result_of(path.parent)["status"] for path in tmp_path.glob("runs/*/*/result.json")}
    assert statuses == {"failed", "done"}


def flip(path: Path, share: float) -> None:
    """Turn one bit over, so far into the file."""
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 16
    path.write_bytes(content)


DAMAGED = ("trajectory.bin", "checkpoint/state.json", "metrics.jsonl", "scores.safetensors")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("name", [*DAMAGED, "checkpoint/weights-*"])
def test_a_damaged_file_of_a_stopped_run_is_made_again(
    finished: Callable[[str], Path], tmp_path: Path, name: str, share: float
) -> None:
    """One flipped bit anywhere: the same command ends with the bits of a run never harmed."""
    words = words_of("sparse_mezo", "full_save_every=4")
    ended = smezo(words, tmp_path, faults=[Fault("loss", 21, signal.SIGKILL).install])
    assert ended.code == -signal.SIGKILL
    for path in run_folder(tmp_path).glob(name):
        flip(path, share)
    ended = smezo(words, tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert_same_run(run_folder(tmp_path), run_folder(finished("sparse_mezo")))


@pytest.mark.parametrize("name", ["state.json", "weights-*", "optimizer-*"])
def test_a_damaged_file_of_a_stopped_first_order_run_is_made_again(
    finished: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Without a trajectory the last good point is the beginning."""
    ended = smezo(words_of("adamw"), tmp_path, faults=[Fault("loss", 8, signal.SIGKILL).install])
    assert ended.code == -signal.SIGKILL
    paths = list((run_folder(tmp_path) / "checkpoint").glob(name))
    assert paths
    for path in paths:
        flip(path, 0.7)
    ended = smezo(words_of("adamw"), tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert name == "state.json" or "trained again from the first step on" in ended.out
    assert_same_run(run_folder(tmp_path), run_folder(finished("adamw")))


@pytest.mark.parametrize("name", [*DAMAGED, "result.json", "config.yaml", "checkpoint/weights-*"])
def test_a_damaged_file_of_a_finished_run_is_made_again(
    finished: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """It is not skipped as if nothing had happened."""
    shutil.copytree(finished("sparse_mezo"), tmp_path / "run")
    folder = run_folder(tmp_path / "run")
    (path,) = folder.glob(name)
    before = path.read_bytes()
    flip(path, 0.7)
    ended = smezo(words_of("sparse_mezo"), tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    if name in ("trajectory.bin", "config.yaml"):  # the seconds of a step are another's
        assert len(path.read_bytes()) == len(before)
    assert_same_run(folder, run_folder(finished("sparse_mezo")))


def test_a_killed_run_computes_no_step_twice(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """What was made after the last look is applied from the trajectory, without a forward."""
    killed = Fault("loss", 12, signal.SIGKILL)  # within step 6; looks are at 3, 6, 9 and 12
    assert smezo(words_of("sparse_mezo"), tmp_path, faults=[killed.install]).code < 0
    folder = run_folder(tmp_path)
    assert state_of(folder)["step"] == 3
    assert (folder / "metrics.jsonl").read_text().splitlines()[-1].startswith('{"step": 5, "loss"')
    again = Fault("loss", 2 * (12 - 5) + 1, signal.SIGKILL)  # one loss more than is needed
    ended = smezo(words_of("sparse_mezo"), tmp_path, faults=[again.install])
    assert ended.code == 0, ended.err
    assert "2 steps after step 3 are recorded: applied" in ended.out
    assert_same_run(folder, run_folder(finished("sparse_mezo")))


def test_a_trajectory_of_other_settings_is_refused(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """One sentence names what differs; nothing is applied or overwritten."""
    shutil.copytree(finished("sparse_mezo"), tmp_path / "run")
    folder = run_folder(tmp_path / "run")
    smezo(words_of("sparse_mezo", "seed=1"), tmp_path)
    foreign = (run_folder(tmp_path) / "trajectory.bin").read_bytes()
    (folder / "trajectory.bin").write_bytes(foreign)
    (folder / "result.json").unlink()
    said = sentence_of(smezo(words_of("sparse_mezo"), tmp_path / "run"))
    assert "another config and seed" in said
    assert "if_exists=fresh" in said
    assert (folder / "trajectory.bin").read_bytes() == foreign


def test_compiled_passes_change_no_bit(finished: Callable[[str], Path], tmp_path: Path) -> None:
    """compile=true and compile=false (and auto) are one run with one name."""
    ended = smezo(words_of("sparse_mezo", "compile=true"), tmp_path)
    assert ended.code == 0, ended.err
    compiled, eager = run_folder(tmp_path), run_folder(finished("sparse_mezo"))
    assert result_of(compiled)["passes"] == "numba"
    assert result_of(eager)["passes"] == "eager"  # auto: a run this short is not worth it
    assert compiled.name == eager.name
    assert records_of(compiled) == records_of(eager)
    for pattern in ("checkpoint/*.safetensors", "scores.safetensors"):
        (mine,), (theirs,) = (list(path.glob(pattern)) for path in (compiled, eager))
        assert mine.read_bytes() == theirs.read_bytes()


def always_worth_it() -> None:
    """As if every run were long enough to compile for."""
    building.WORTH_IT = dense.WORTH_COMPILING = 0


def numba_is_broken() -> None:
    """As if Numba were not installed."""
    sys.modules["numba"] = None  # type: ignore[assignment]  # importing it raises ImportError


def test_without_numba_compile_is_refused_and_auto_goes_on(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """One sentence for compile=true; for auto the same numbers and a line on what is missing."""
    words = words_of("sparse_mezo", "compile=true")
    said = sentence_of(smezo(words, tmp_path / "true", faults=[numba_is_broken]))
    assert "compile=true" in said
    assert "Numba" in said
    faults = [numba_is_broken, always_worth_it]
    ended = smezo(words_of("sparse_mezo"), tmp_path / "auto", faults=faults)
    assert (ended.code, ended.err) == (0, "")
    (line,) = (line for line in ended.out.splitlines() if "Numba" in line)
    assert "passes  eager" in line
    assert_same_run(run_folder(tmp_path / "auto"), run_folder(finished("sparse_mezo")))


def numba_is_off() -> None:
    """As if its switch were set."""
    os.environ["NUMBA_DISABLE_JIT"] = "1"


def test_a_switch_that_turns_the_compiler_off_is_named(tmp_path: Path) -> None:
    said = sentence_of(
        smezo(words_of("sparse_mezo", "compile=true"), tmp_path, faults=[numba_is_off])
    )
    assert "compile=true: the compiler is off as long as NUMBA_DISABLE_JIT=1 is set" in said


# ------------------------------------------------------------------------------------------ refused


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    """While one process trains, the same command elsewhere names it and changes nothing."""
    words = words_of("mezo")
    with Started(words, tmp_path, faults=[Fault("loss", 5, signal.SIGSTOP).install]) as first:
        until(lambda: list(tmp_path.glob("runs/default/*/metrics.jsonl")))
        said = sentence_of(smezo(words, tmp_path, faults=[no_model]))
        assert f"process {first.pid}" in said
        assert "if_exists=fresh" not in said
        assert f"process {first.pid}" in sentence_of(smezo([*words, "if_exists=fresh"], tmp_path))
        os.kill(first.pid, signal.SIGCONT)
        assert first.wait().code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["method=mezo", "sparsity=0.8"], ["sparsity", "sparse_mezo"]),
        (["method=adamw", "eps=1e-3"], ["eps", "mezo"]),
        (["method=adamw", "compile=true"], ["compile", "adamw"]),
        (["method=sparse_mezo", "sparsity=1"], ["sparsity=1", "[0, 1)"]),
        (["method.freeze=[nosuch*]"], ["nosuch*"]),
        (["task.num_dev=9999"], ["task.num_dev=9999", "200"]),
        (["task.prompt='{text} It was'", "task.labels=[good]"], ["task.labels", "2 classes"]),
        (["model.max_length=8", "task.labels=[abcdefgh,good]", "task.prompt=0"], ["task.labels"]),
    ],
    ids=lambda words: " ".join(words) if "=" in words[0] else "",
)
def test_what_cannot_be_run_is_refused_in_one_sentence(
    words: list[str], says: list[str], tmp_path: Path
) -> None:
    """Exit code 2, what was given and what is allowed; never a traceback."""
    said = sentence_of(smezo(["task=toy", "model=tiny-llama", "steps=2", *words], tmp_path))
    for word in says:
        assert word in said


def test_prompts_that_are_cut_are_counted_in_one_line(tmp_path: Path) -> None:
    """How many and to what length, ours alone: the tokenizer's own warning would mislead."""
    ended = smezo(words_of("sgd", "model.max_length=10", "task.prompt=1"), tmp_path)
    assert (ended.code, ended.err) == (0, "")
    (line,) = (line for line in ended.out.splitlines() if "10 tokens" in line)
    assert result_of(run_folder(tmp_path))["truncated_prompts"] == 32 + 16 + 24
    assert "72" in line


def test_cuda_is_refused_where_there_is_none(tmp_path: Path) -> None:
    """One sentence with the way out, before anything is written."""
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    for device in ("cuda", "cuda:3"):
        said = sentence_of(smezo([*SMALL, f"device={device}"], tmp_path, faults=[no_model]))
        assert f"device={device}" in said
        assert "device=cpu" in said
    assert not list(tmp_path.glob("runs/*/*"))


# -------------------------------------------------------------------- terminal, W&B, the real thing


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    """Title, count, loss, dev, steps a second and time left move; the log file stays plain."""
    ours, theirs = pty.openpty()
    try:
        terminal = os.ttyname(theirs)
        env = {"TERM": "xterm-256color", "COLUMNS": "100"}
        seen = b""
        with Started(words_of("mezo", "steps=60"), tmp_path, out=terminal, env=env) as started:
            while started.alive or select.select([ours], [], [], 0)[0]:
                if select.select([ours], [], [], 0.05)[0]:
                    seen += os.read(ours, 65536)
            ended = started.wait()
    finally:
        os.close(ours)
        os.close(theirs)
    text = seen.decode()
    assert ended.code == 0, ended.err
    assert "\x1b[?25l" in text  # a moving bar hides the cursor ...
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # ... and gives it back
    assert re.search(r"train.*/60.*loss \d\.\d+.*/s.*left", text)
    log = (run_folder(tmp_path) / "console.log").read_text()
    assert "\x1b" not in log
    assert "test accuracy" in log


def test_wandb_offline_needs_no_network(finished: Callable[[str], Path], tmp_path: Path) -> None:
    """logger=wandb writes an offline run beside metrics.jsonl; name and numbers stay."""
    pytest.importorskip("wandb")
    # Any request would go to a port that nobody listens on.
    env = {name: "http://127.0.0.1:9" for name in ("WANDB_BASE_URL", "HTTPS_PROXY", "HTTP_PROXY")}
    ended = smezo(words_of("sgd", "logger=wandb"), tmp_path, env=env)
    assert ended.code == 0, ended.err
    folder, plain = run_folder(tmp_path), run_folder(finished("sgd"))
    (offline,) = folder.glob("wandb/offline-run-*")
    (file,) = offline.glob("*.wandb")
    content = file.read_bytes()
    assert b"projected_grad" in content
    assert b"dev.loss" in content
    assert folder.name == plain.name
    assert records_of(folder) == records_of(plain)
    (mine,), (theirs,) = (list(path.glob("checkpoint/weights*")) for path in (folder, plain))
    assert mine.read_bytes() == theirs.read_bytes()


def test_the_module_is_a_command(finished: Callable[[str], Path]) -> None:
    """`python -m smezo_cli.train` from another folder: here it finds the finished run."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "smezo_cli.train", *words_of("sparse_mezo")]
    cwd = finished("sparse_mezo")
    ended = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("\n") == 1
    assert "done already" in ended.stdout


def test_the_executor_is_chosen_by_measuring_and_changes_no_number(
    tmp_path: Path, finished: Callable[[str], Path]
) -> None:
    """One line of the console and result.json name it; training has the bits of sequential."""
    done = {}
    for executor in ("auto", "lockstep"):
        words = [w for w in words_of("mezo", "name=by") if w != _SEQUENTIAL]
        (tmp_path / executor).mkdir()
        ended = smezo([*words, f"method.executor={executor}"], tmp_path / executor)
        assert ended.code == 0, ended.err
        done[executor] = run_folder(tmp_path / executor, "by")
        said = [line for line in ended.out.splitlines() if line.startswith("  executor  ")]
        assert len(said) == (executor == "auto")
        if said:
            assert re.search(r"(sequential|lockstep) \(two forwards: .* s, .* s\)$", said[0])
    assert result_of(done["auto"])["executor"] in ("sequential", "lockstep")
    assert result_of(done["lockstep"])["executor"] == "lockstep"
    sequential = run_folder(finished("mezo"))
    for folder in done.values():
        losses, wanted = (
            [
                json.loads(line).get("loss")
                for line in (f / "metrics.jsonl").read_text().splitlines()
            ]
            for f in (folder, sequential)
        )
        assert losses == wanted
        assert result_of(folder)["test"] == result_of(sequential)["test"]

"""scripts/gpu_check.py on a CPU: it runs with little installed, and what is wrong fails."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor

from smezo_cli.zo.executors.batched import Batched
from smezo_cli.zo.noise import KINDS
from smezo_cli.zo.passes.draw import Draw, Rule
from smezo_cli.zo.passes.eager import EagerPasses
from smezo_cli.zo.selections.masks import RULES
from tests import ROOT
from tests.scripts_loaded import script as load_script

SCRIPT = ROOT / "scripts" / "gpu_check.py"
CPU = torch.device("cpu")
MODULES = ("rows", "models", "bits", "steps", "executors", "collective")
FILES = sorted((ROOT / "conf" / "model").glob("*.yaml"))
NUMBERED = [file.stem for file in FILES if "config" in yaml.safe_load(file.read_text())]

# What a machine of a bare torch has not; nothing finds it, and no installed version is told of it.
WITHOUT = """
import runpy, sys
absent = {"hydra", "omegaconf", "datasets", "wandb", "peft", "pydantic", "rich", "gguf"}
for finder in sys.meta_path:
    def find_spec(name, path=None, target=None, found=finder.find_spec):
        return None if name.partition(".")[0] in absent else found(name, path, target)
    class Finder:
        pass
    Finder.find_spec = staticmethod(find_spec)
    if hasattr(finder, "find_distributions"):
        Finder.find_distributions = staticmethod(finder.find_distributions)
    sys.meta_path[sys.meta_path.index(finder)] = Finder
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> SimpleNamespace:
    """The modules of scripts/gpu_check."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return SimpleNamespace(
        **{name: importlib.import_module(f"gpu_check.{name}") for name in MODULES}
    )


@pytest.fixture
def script(check: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script itself, whose settings of the process are undone."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    return load_script("gpu_check")


@pytest.fixture
def place(check: SimpleNamespace) -> Any:
    return check.rows.Place(CPU, tiny=True, until=time.monotonic() + 60)


def bounded(check: SimpleNamespace, seconds: float = 60) -> Any:
    """A place where bounds of time hold, as on a GPU."""
    return check.rows.Place(CPU, tiny=False, until=time.monotonic() + seconds)


# ------------------------------------------------------------------------------------ all of it


def test_all_checks_pass_on_a_cpu_without_the_libraries_of_the_command_line(tmp_path: Path) -> None:
    """No Hydra, OmegaConf, datasets, W&B or PEFT, nothing installed of smezo, another folder."""
    file = tmp_path / "found.json"
    words = [str(SCRIPT), "--device", "cpu", "--tiny", "--json", str(file)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT, *words],
        cwd=tmp_path,
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(file.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == len(found["rows"])  # each has a name of its own
    assert run.stdout.splitlines()[-1].startswith(f"{len(rows) - 2} passed, 0 failed, 2 skipped")
    assert all(name in run.stdout for name in rows)
    assert found["torch"] == torch.__version__
    assert found["command"] == words[1:]
    skips = {name: row["note"] for name, row in rows.items() if row["status"] != "pass"}
    assert skips.keys() == {"plan: tiny-opt", "plan: tiny-llama"}
    for note in skips.values():
        assert "which is not installed" in note
    eager = rows["bits: update, eager passes"]["numbers"]
    every = len(RULES) * len(KINDS) * 3 * 2  # three dtypes, to nearest and by chance
    assert (eager["cases"], eager["differ"]) == (f"{every}/{every}", 0)
    for name in ("mezo", "sparse_mezo"):
        numbers = rows[f"step: {name}, tiny-llama"]["numbers"]
        assert min(numbers[key] for key in ("ms", "textbook_ms", "two_forwards_ms")) > 0
        assert rows[f"memory: {name}, tiny-llama"]["numbers"]["inference_GB"] > 0.01  # torch alone
    for executor in ("side_path", "batched"):
        numbers = rows[f"executors: lozo, tiny-llama, float32: {executor}"]["numbers"]
        assert numbers["differ"] <= numbers["bound"]
    assert "all_reduce: gloo, one rank" in rows


def test_a_check_that_breaks_fails_and_the_others_go_on(
    script: ModuleType, check: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = check.rows.row

    def breaks(place: Any) -> Iterator[Any]:
        yield row("before", True)
        raise RuntimeError("CUDA error: an illegal access\nand more")

    def is_right(place: Any) -> Iterator[Any]:
        yield row("after", True, number=3)

    monkeypatch.setattr(script, "checks", lambda tiny: {"bits": breaks, "self-check": is_right})
    monkeypatch.setattr(
        sys, "argv", ["x", "--device", "cpu", "--tiny", "--json", str(tmp_path / "f")]
    )
    assert script.main() == 1
    rows = json.loads((tmp_path / "f").read_text())["rows"]
    assert [(r["name"], r["status"]) for r in rows] == [
        ("before", "pass"),
        ("bits", "fail"),
        ("after", "pass"),
    ]
    assert rows[1]["note"] == "RuntimeError: CUDA error: an illegal access"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--only", "self"])
    assert script.main() == 0
    assert [r["name"] for r in json.loads((tmp_path / "f").read_text())["rows"]] == ["after"]
    assert [r.status for r in script.run(CPU, True, [], 0.0)] == ["skip", "skip"]


def test_budgets_name_all_checks_and_leave_the_rest_of_five_minutes(script: ModuleType) -> None:
    assert script.checks(True).keys() == script.checks(False).keys() == script.BUDGETS.keys()
    assert sum(script.BUDGETS.values()) <= script.ALL_SECONDS < 300


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cpu"], "add --tiny"),
        (["--device", "tpu"], "one of cuda, cuda:N, cpu"),
        (["--device", "cpu", "--tiny", "--only", "speed"], "beginnings of bits,"),
        (["--device", "cpu", "--tiny", "--json", "/no/such/file"], "there is no folder /no/such"),
        pytest.param(
            [],
            "torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_a_mistake_on_the_line_is_told_in_a_sentence(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


# --------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", NUMBERED)
def test_numbers_of_a_model_are_those_that_omegaconf_reads(
    check: SimpleNamespace, name: str
) -> None:
    whole = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml")
    wanted = OmegaConf.to_container(whole.config)  # type: ignore[union-attr]  # it is a mapping
    found = check.models.numbers_of(name)
    assert found == wanted
    assert repr(found) == repr(wanted)  # 1 is not 1.0, nor True


def test_a_model_is_the_same_at_each_build_and_has_all_its_weights(check: SimpleNamespace) -> None:
    build = check.models.build
    state = torch.get_rng_state()
    first, second = (build("tiny-llama", torch.bfloat16, CPU) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert check.models.num_weights(first) == 37_472  # as conf/model says
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.bfloat16
    assert check.models.num_weights(build("llama-7b", torch.bfloat16, torch.device("meta"))) == (
        6_738_415_616
    )


def test_layers_are_halved_until_a_model_fits(check: SimpleNamespace) -> None:
    fit = check.models.layers_that_fit
    assert fit("llama-7b", 80 << 30, 4.0) == 32
    assert fit("llama-7b", 24 << 30, 4.0) == 16
    assert fit("llama-7b", 1 << 28, 4.0) == 0


# ----------------------------------------------------------------------------------------- bits


class OneBitOff(EagerPasses):
    """Passes that write the last bit of one entry wrongly, or the sign of a zero."""

    name = "wrong"

    def __init__(self, rule: Rule, spoil: Callable[[Tensor], None]) -> None:
        super().__init__(rule)
        self.spoil = spoil

    def move(self, weight: Tensor, out: Tensor, draw: Draw) -> None:
        super().move(weight, out, draw)
        self.spoil(out)


def flips_a_bit(out: Tensor) -> None:
    out[:1].view(torch.int16 if out.element_size() == 2 else torch.int32).bitwise_xor_(1)


def loses_signs_of_zeros(out: Tensor) -> None:
    out.add_(0.0)  # -0.0 + 0.0 is 0.0


@pytest.mark.parametrize("spoil", [flips_a_bit, loses_signs_of_zeros])
def test_a_wrong_bit_fails(
    check: SimpleNamespace,
    place: Any,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Tensor], None],
) -> None:
    monkeypatch.setattr(check.bits, "_eager", lambda rule, device: OneBitOff(rule, spoil))
    monkeypatch.setattr(check.bits, "_fused", lambda rule, device: EagerPasses(rule))
    rows = {row.name: row for row in check.bits.check(place)}
    wrong = rows.pop("bits: update, eager passes")
    assert wrong.status == "fail"
    assert wrong.numbers["by"] == "wrong"
    assert wrong.numbers["differ"] >= 36  # of 36 cases
    assert wrong.note.endswith(" gaussian nearest float32 of 4099")
    assert {row.status for row in rows.values()} == {"pass"}


def test_passes_that_are_not_fused_fail(
    check: SimpleNamespace, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    first, *others = check.rows.timed("bits", check.bits.check, place)
    assert first.status == "fail"
    assert "not fused by numba: the compiler is off" in first.note
    assert {row.status for row in others} == {"pass"}  # eager ones have the bits


def test_cases_that_the_time_did_not_reach_are_counted(
    check: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check.bits, "_fused", lambda rule, device: EagerPasses(rule))
    monkeypatch.setattr(check.bits, "SIZES", (7, 8))
    rows = list(check.bits.check(bounded(check, 0.0)))
    assert rows[0].numbers["rules"] == "1/12"
    assert [row.numbers["cases"] for row in rows[1:]] == ["1/72"] * 8 + ["1/24"]
    assert all("the time was over" in row.note for row in rows[1:9])
    assert {row.status for row in rows} == {"pass"}


def test_an_update_of_another_threshold_fails(
    check: SimpleNamespace, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps that are made again see thresholds, masks and updates together."""
    assert check.bits._replayed(place).status == "pass"
    calls = iter(range(1000))
    small_model = check.bits._small_model

    def another(dtype: torch.dtype) -> torch.nn.Module:
        model: torch.nn.Module = small_model(dtype)
        if next(calls) % 2:
            next(model.parameters()).data[0, 0] += 1
        return model

    monkeypatch.setattr(check.bits, "_small_model", another)
    row = check.bits._replayed(place)
    assert row.status == "fail"
    assert row.numbers["differ"] >= 24


# ---------------------------------------------------------------------------- steps and executors


@pytest.fixture
def steps(check: SimpleNamespace) -> Any:
    model = check.models.build("tiny-llama", torch.bfloat16, CPU)
    return check.steps.Steps(model, check.models.loss_of(model, 2, 8))


def test_a_step_slower_than_the_textbook_fails(
    check: SimpleNamespace, steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"forward": 0.1, "mezo": 0.3, "sparse_mezo": 0.5}
    seconds |= {"textbook mezo": 0.4, "textbook sparse_mezo": 0.4}
    monkeypatch.setattr(
        check.steps, "interleaved", lambda *_: {name: [s] * 3 for name, s in seconds.items()}
    )
    quick, slow = check.steps._times("x", steps, bounded(check))
    assert (quick.status, slow.status) == ("pass", "fail")
    assert quick.numbers["over_textbook"] == pytest.approx(0.75)
    assert quick.numbers["over_two_forwards"] == pytest.approx(1.5)
    assert slow.numbers["textbook_ms"] == pytest.approx(400)


def test_a_textbook_step_that_does_not_fit_is_skipped_and_ours_is_not(
    check: SimpleNamespace, steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(closure: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(steps.textbooks["sparse_mezo"], "step", too_much)
    (row,) = check.steps._times("x", steps, bounded(check))
    assert row.status == "skip"
    assert "textbook sparse_mezo" in row.note
    monkeypatch.setattr(steps.methods["mezo"], "step", too_much)
    with pytest.raises(torch.OutOfMemoryError):
        next(check.steps._times("x", steps, bounded(check)))


def test_a_step_that_takes_a_copy_of_the_model_fails(
    check: SimpleNamespace, steps: Any, monkeypatch: pytest.MonkeyPatch, place: Any
) -> None:
    largest = max(p.numel() * 2 for p in steps.model.parameters())
    peaks = iter([1000, 1000 + 3 * largest, 1001 + 3 * largest + check.steps.SCRATCH])
    monkeypatch.setattr(check.steps, "_peak", lambda *_: next(peaks))
    assert [row.status for row in check.steps._memory("x", steps, place)] == ["pass", "fail"]


def test_a_peak_far_from_the_plan_fails(
    check: SimpleNamespace, steps: Any, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that were left out for want of memory are left out of the plan, too."""
    skips = [check.steps._planned("tiny-llama", layers, 2, 8, steps, place) for layers in (2, 1)]
    assert [row.status for row in skips] == ["skip", "skip"]
    whole, half = (row.numbers["planned_GB"] * 1e9 for row in skips)
    a_layer = (37_472 - 335 * 32) // 2  # weights, less the embedding and the last norm
    assert whole - half == pytest.approx(2 * a_layer, rel=0.1)  # work of a step changes a little
    assert whole > 2 * 37_472  # bytes of all weights in bfloat16
    on_cuda = check.rows.Place(torch.device("cuda:0"), tiny=False, until=place.until)
    for factor, status in ((1.05, "pass"), (1.2, "fail"), (0.8, "fail")):
        monkeypatch.setattr(check.steps, "_peak", lambda *_, factor=factor: factor * whole)
        row = check.steps._planned("tiny-llama", 2, 2, 8, steps, on_cuda)
        assert row.status == status


def test_rounds_rotate_and_end_with_the_time(check: SimpleNamespace) -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    check.steps.interleaved(runs, 3, bounded(check), 0.0)
    assert "".join(order) == "abcbcacab"
    seconds = check.steps.interleaved(runs, 3, bounded(check, 0.0), 0.0)
    assert [len(spent) for spent in seconds.values()] == [1, 1, 1]


def test_a_model_that_reads_its_weights_past_the_probes_fails(
    check: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = check.models.build("tiny-llama", torch.float32, CPU)
    loss = check.models.loss_of(model, 2, 8)
    held = model.model.norm.weight

    def past() -> Tensor:
        found: Tensor = loss() + held.square().sum()
        return found

    monkeypatch.setattr(check.steps, "loss_of", lambda *_: past)
    row = check.steps._self_checked("x", model, 2, 8)
    assert row.status == "fail"
    assert "model.norm.weight" in row.note


def test_an_executor_that_gives_other_losses_fails(
    check: SimpleNamespace, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Batched.losses

    def other(self: Batched, *given: Any) -> list[Tensor]:
        return [loss + 1e-3 for loss in losses(self, *given)]

    monkeypatch.setattr(Batched, "losses", other)
    (row,) = check.rows.timed("executors", check.executors.check, place)
    assert row.status == "fail"
    assert "more than rounding" in row.note
    monkeypatch.setattr(check.executors.LOZO, "choose_executor", lambda self, closure: {})
    first, *_ = check.rows.timed("executors", check.executors.check, place)
    assert first.status == "fail"
    assert first.numbers["differ"] == pytest.approx(1e-3, rel=0.1)

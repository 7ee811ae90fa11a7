"""Numbers are right where OpenMP gives fewer threads than torch asks for.

Such settings are read when a process begins, so each is tried in a process of its own.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smezo_cli.cli.verbs import main
from smezo_cli.models import onednn
from smezo_cli.zo.passes import openmp
from tests import ROOT

# Each lets two threads be asked for, and one be given (always, or when the machine is busy).
SETTINGS = ["OMP_THREAD_LIMIT=1", "OMP_DYNAMIC=TRUE", "OMP_MAX_ACTIVE_LEVELS=0"]
RUN = [
    *("task=toy", "model=tiny-llama", "task.num_train=16", "task.num_dev=16", "task.num_test=24"),
    *("task.prompt=0", "device=cpu", "method=zero_shot"),
]
needs_openmp = pytest.mark.skipif(
    openmp.find() is None or not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]  # untyped in torch
    reason="torch was built without OpenMP or oneDNN, or its OpenMP cannot be called",
)


def layers() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64, bias=False))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def by_torch(model: nn.Module, x: Tensor) -> Tensor:
    with onednn.as_torch_has_it(model), torch.inference_mode():
        return model(x)


_IN_A_PROCESS = """
import json, sys, threading, torch

from torch.nn import functional as F
from smezo_cli.models import onednn as linear
from smezo_cli.zo.passes import openmp
from smezo_cli.zo.passes.by_numba import NumbaPasses, _SHARE
from smezo_cli.zo.passes.draw import Rule
from smezo_cli.zo.passes.eager import EagerPasses
from tests.zo.passes.test_openmp import by_torch, layers
from tests.zo.passes.scales import weight_of
from tests.zo.passes.test_passes import draw_of, moved_by, same

found = {"asked": torch.get_num_threads(), "may give fewer": openmp.may_give_fewer()}
x, said, model = torch.randn(32, 64), [], layers()
found["layers unsettled"] = linear.use_onednn(model, said.append)
with torch.inference_mode():
    found["right unsettled"] = torch.allclose(model(x), by_torch(model, x), rtol=1e-4, atol=1e-3)
found["said"] = said

if "passes" in sys.argv:
    rule = Rule()
    fast, eager, draw = NumbaPasses(rule), EagerPasses(rule), draw_of(rule)
    for dtype in (torch.float32, torch.bfloat16):
        weight = weight_of(4 * _SHARE + 3, dtype)
        wanted, back = moved_by(eager, weight, draw), draw._replace(coefficients=-draw.coefficients)
        plus, minus, in_place = (torch.empty_like(weight) for _ in range(3))
        fast.move_both(weight, plus, minus, draw)
        in_place.copy_(weight)
        fast.move(in_place, in_place, draw)
        index = torch.arange(5, weight.numel(), 3)
        found[f"passes {dtype}"] = [
            same(moved_by(fast, weight, draw), wanted),
            same(in_place, wanted),
            same(plus, wanted),
            same(minus, moved_by(eager, weight, back)),
            same(fast.move_at(weight[index], index, weight.numel(), draw), wanted[index]),
        ]

found["line"] = openmp.settle()
found["settled"] = not openmp.may_give_fewer()
found["layers"] = linear.use_onednn(model)
with torch.inference_mode():
    found["right"] = torch.allclose(model(x), by_torch(model, x), rtol=1e-4, atol=1e-3)
    a, b = torch.randn(64, 128).bfloat16(), torch.randn(256, 128).bfloat16()
    found["low precision"] = [
        torch.allclose(F.linear(a, b).float(), a.float() @ b.float().T, rtol=0.02, atol=0.2)
        for _ in range(5)
    ]
def elsewhere():
    openmp.give_all()
    found["settled elsewhere"] = not openmp.may_give_fewer()
thread = threading.Thread(target=elsewhere)
thread.start()
thread.join()
print(json.dumps(found))
"""


def in_a_process(setting: str, *what: str) -> dict[str, Any]:
    """What was found under the setting."""
    name, _, value = setting.partition("=")
    env = os.environ | {"OMP_NUM_THREADS": "2", name: value, "PYTHONPATH": str(ROOT)}
    end = subprocess.run(
        [sys.executable, "-c", _IN_A_PROCESS, *what],
        **{"capture_output": True, "text": True, "env": env, "cwd": ROOT},
    )
    assert end.returncode == 0, end.stderr
    found: dict[str, Any] = json.loads(end.stdout)
    return found


@needs_openmp
@pytest.mark.parametrize("setting", SETTINGS)
def test_products_and_passes_are_right_where_fewer_threads_may_be_given(setting: str) -> None:
    """oneDNN is left aside, and said, or settled and right, as is low precision; passes always."""
    found = in_a_process(setting, *(["passes"] if setting != SETTINGS[-1] else []))
    if found["asked"] < 2:
        pytest.skip("this machine has one processor")
    assert found["may give fewer"]
    assert found["layers unsettled"] == 0
    assert found["said"] == [
        "  linear layers by torch, not oneDNN: with 2 threads OpenMP may give fewer"
    ]
    assert found["right unsettled"]
    if setting != SETTINGS[-1]:
        assert found["passes torch.float32"] == found["passes torch.bfloat16"] == [True] * 5
    assert setting in found["line"]
    assert found["line"].startswith("  threads ")
    assert found["settled"]
    assert found["settled elsewhere"]
    assert found["layers"] == 2
    assert found["right"]
    assert found["low precision"] == [True] * 5


# Two runs from one import of torch: each is a process that was forked before anything is computed.
_LIMITED = """
import os, sys
import smezo_cli.run.session
from smezo_cli.cli.verbs import main

for dtype in ("float32", "bfloat16"):
    if not (child := os.fork()):
        sys.exit(main(["train", *sys.argv[1:], f"dtype={dtype}", f"name={dtype}"]))
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(code)
"""


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in each dtype where torch asks for two threads and OpenMP gives one."""
    place = tmp_path_factory.mktemp("limited")
    limit = {"OMP_NUM_THREADS": "2", "OMP_THREAD_LIMIT": "1"}
    env = os.environ | limit | {"PYTHONPATH": str(ROOT)}
    end = subprocess.run(
        [sys.executable, "-c", _LIMITED, *RUN],
        **{"capture_output": True, "text": True, "env": env, "cwd": place},
    )
    assert end.returncode == 0, end.stderr
    return place


def result_in(place: Path, dtype: str) -> dict[str, Any]:
    (file,) = place.glob(f"runs/{dtype}/*/result.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@needs_openmp
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_with_a_limit_of_threads_scores_as_one_without(
    dtype: str, limited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scores are those of one thread, and it says how many there are."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", *RUN, f"dtype={dtype}", f"name={dtype}"]) == 0
    ours, wanted = (result_in(place, dtype) for place in (limited, tmp_path))
    for result in (ours, wanted):
        assert result["versions"]["threads"] == 1
        assert (result["onednn_layers"] > 0) == (dtype == "float32")
    if (os.cpu_count() or 1) > 1:
        (log,) = limited.glob(f"runs/{dtype}/*/console.log")
        assert "  threads 1, not 2: OMP_THREAD_LIMIT=1" in log.read_text()
    assert ours["test"] == wanted["test"]
    assert math.isfinite(ours["test"]["loss"])


# --- the proof --------------------------------------------------------------------------------


@pytest.fixture
def two_threads() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def spoilt(how: Callable[[Tensor, Tensor], Tensor | None]) -> Callable[..., Tensor]:
    """oneDNN's product where ``how`` does not give another."""
    real = onednn._product

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = real(x, weight, bias)
        other = how(found.clone(), weight)
        return found if other is None else other

    return product


def _half(found: Tensor, weight: Tensor) -> Tensor:
    found[:, weight.shape[0] // 2 :] = 0
    return found


def _entry(found: Tensor, weight: Tensor) -> Tensor:
    found[-1, -1] += 0.01
    return found


def _nan(found: Tensor, weight: Tensor) -> Tensor:
    found[-1, -1] = math.nan
    return found


@needs_openmp
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("wrong", [_half, _entry, _nan])
def test_a_wrong_product_is_found_before_it_is_used(
    wrong: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it missing, or one entry that is off: the layers stay torch's, and that is said."""
    monkeypatch.setattr(onednn, "_product", spoilt(wrong))
    said, model = list[str](), layers()
    assert onednn.use_onednn(model, said.append) == 0
    assert onednn.num_onednn(model) == 0
    assert said == [
        "  linear layers by torch, not oneDNN: with 2 threads oneDNN multiplies wrongly"
    ]
    x = torch.randn(3, 64)
    with torch.inference_mode():
        assert torch.equal(model(x), by_torch(model, x))


@needs_openmp
@pytest.mark.usefixtures("two_threads")
def test_a_product_is_proven_again_where_the_number_of_threads_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong with one thread alone: torch's there, said once, and oneDNN's with two as before."""
    monkeypatch.setattr(
        onednn,
        "_product",
        spoilt(lambda f, w: _half(f, w) if torch.get_num_threads() == 1 else None),
    )
    said, model = list[str](), layers()
    assert onednn.use_onednn(model, said.append) == 2
    x = torch.randn(3, 64)
    with torch.inference_mode():
        before = model(x)
        torch.set_num_threads(1)
        assert torch.equal(model(x), by_torch(model, x))
        assert torch.equal(model(x), by_torch(model, x))
        assert onednn.num_onednn(model) == 0
        torch.set_num_threads(2)
        assert torch.equal(model(x), before)
    assert onednn.num_onednn(model) == 2
    assert said == ["  linear layers by torch, not oneDNN: with 1 thread oneDNN multiplies wrongly"]


@needs_openmp
def test_a_product_is_proven_for_every_shape_of_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of an output layer that are computed alone are a shape of their own."""
    monkeypatch.setattr(
        onednn, "_product", spoilt(lambda f, w: _half(f, w) if w.shape[0] == 10 else None)
    )
    said, model = list[str](), layers()
    assert onednn.use_onednn(model, said.append) == 2
    last: Any = model[1]  # type: ignore[index]  # of a Sequential
    x = torch.randn(3, 64)
    with torch.inference_mode():
        model(x)
        assert not said
        last.weight = nn.Parameter(last.weight[:10].clone(), requires_grad=False)
        model(x)  # its first layer by oneDNN, of which nothing is known to be wrong yet
        assert len(said) == 1
        assert torch.equal(model(x), by_torch(model, x))
    assert len(said) == 1


@needs_openmp
def test_rounding_and_weights_that_are_not_finite_are_no_wrong_products() -> None:
    """Of sums of 11,008 products, of large and small weights, and where a weight is NaN or inf."""
    generator = torch.Generator().manual_seed(0)
    for shape, scale in (
        ((64, 11008), 1.0),
        ((300, 576), 1e-8),
        ((7, 3), 1e4),
        ((49152, 64), 0.02),
    ):
        weight = torch.randn(shape, generator=generator) * scale
        bias = torch.randn(shape[0], generator=generator)
        assert onednn._is_right(weight, None)
        assert onednn._is_right(weight, bias)
        weight[1, 1], weight[0, 2] = math.nan, math.inf
        assert onednn._is_right(weight, bias)
    x = torch.randn(16, 576, generator=generator)
    weight = torch.randn(576, 576, generator=generator)
    with torch.inference_mode():
        torch.testing.assert_close(
            onednn._product(x, weight, None), F.linear(x, weight), rtol=1e-4, atol=1e-4
        )

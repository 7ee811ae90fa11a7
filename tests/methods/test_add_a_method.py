"""One file and one YAML add a method, and nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

CODE = '''
"""A sign update for a test: every weight moves by lr against the sign of the estimate."""

from typing import Any, Unpack

from torch import Tensor, nn

from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Gradient
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common
from smezo_cli.zo.ranges import Count, Fraction, Noise
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.updates.base import Update, WeightWriter


class Sign(Update):
    """theta <- theta - lr sign(m) with m <- beta m + (1 - beta) g."""

    slots = ("mean",)

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        def change(g: Tensor, mean: Tensor) -> Tensor:
            mean.mul_(self.beta).add_(g * (1 - self.beta))
            return mean.sign().mul_(-lr)

        weights.elementwise(gradient, change, decay=lr * weights.weight_decay)

    def identity(self) -> dict[str, Any]:
        return {"beta": self.beta}


class AddedSign(ZeroOrder):
    """MeZO with the sign of a mean of estimates."""

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: Fraction = 0.9,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=Sign(beta),
            **common,
        )
'''
YAML = """\
# @package _global_
# A sign update that a test adds.
defaults:
  - mezo
  - _self_

lr: 1e-3
eps: 1e-3

method:
  name: added_sign
  _target_: smezo_cli.methods.added_sign.AddedSign
  beta: 0.5
"""
TINY = (
    "method=added_sign model=tiny-llama task=toy task.num_train=8 task.num_dev=4 task.num_test=4 "
    "task.prompt=0 device=cpu batch_size=2 eval_every=2 method.executor=sequential"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, the settings and the tests, with one file and one YAML more."""
    folder = tmp_path_factory.mktemp("checkout")
    skip = shutil.ignore_patterns("old")
    for name in ("smezo_cli", "conf", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "smezo_cli" / "methods" / "added_sign.py").write_text(CODE)
    (folder / "conf" / "method" / "added_sign.yaml").write_text(YAML)
    return folder


def python(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)


# What each command says is a list of the last line: torch is imported once for all of them.
COMMANDS = """
import contextlib, glob, io, json, sys
from smezo_cli.cli import main

said = []
for line in sys.argv[1:]:
    words = [path for word in line.split() for path in glob.glob(word) or [word]]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(words) == 0, line
    said.append(out.getvalue())
print(json.dumps(said))
"""


def smezo(checkout: Path, *commands: str) -> list[str]:
    """What each command said, one after the other in one interpreter of the copy."""
    ended = python(checkout, "-c", COMMANDS, *commands)
    assert ended.returncode == 0, ended.stderr
    said: list[str] = json.loads(ended.stdout.splitlines()[-1])
    return said


def test_it_trains_goes_on_is_replayed_listed_and_planned(checkout: Path) -> None:
    """Six steps in two parts are six steps in one, and the trajectory names the method."""
    plan = f"plan {TINY} steps=6"
    *_, listed, said, mezo = smezo(
        checkout,
        f"train {TINY} steps=6 name=whole",
        f"train {TINY} steps=4 name=parts",
        f"train {TINY} steps=6 name=parts",
        "replay runs/parts/* --split none",
        *("ls methods", plan, plan.replace("added_sign", "mezo")),
    )
    assert "A sign update that a test adds." in listed
    assert "optimizer state" in said  # what its update keeps
    assert "optimizer state" not in mezo
    runs = {name: next((checkout / "runs" / name).iterdir()) for name in ("whole", "parts")}
    found = {n: json.loads((run / "result.json").read_text()) for n, run in runs.items()}
    assert found["whole"]["weights"] == found["parts"]["weights"]
    assert b'"AddedSign"' in (runs["whole"] / "trajectory.bin").read_bytes()


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("method.beta=1", "method.beta=1: method.beta must be a number in [0, 1), for example"),
        (
            "method.beat=0.5",
            "method takes no beat, did you mean beta? (there are: beta, clip_",
        ),
        ("method.num_queries=0", "method.num_queries must be a whole number of at least 1"),
    ],
)
def test_a_wrong_value_is_one_sentence_before_any_job(word: str, says: str, checkout: Path) -> None:
    """Also in a sweep, whose other jobs do not start; and without torch."""
    script = "import sys; from smezo_cli.cli import main; code = main(sys.argv[1:]); "
    script += "print('torch' in sys.modules); sys.exit(code)"
    words = f"train -m {TINY} steps=2 seed=0,1 {'+' if 'beat' in word else ''}{word} name=refused"
    ended = python(checkout, "-c", script, *words.split())
    assert ended.returncode == 2
    assert ended.stdout == "False\n"
    assert ended.stderr.count("\n") == 1
    assert says in ended.stderr
    assert not (checkout / "runs" / "refused").exists()


def test_it_passes_what_every_method_does(checkout: Path) -> None:
    files = [f"tests/methods/test_{of}.py" for of in ("every_method", "rates")]
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    ended = python(checkout, *words, "-k", "added_sign or listed")
    assert ended.returncode == 0, ended.stdout[-3000:]
    (passed,) = re.findall(r"(\d+) passed, \d+ deselected", ended.stdout)
    assert int(passed) >= 18  # one of each claim, and that a rate is listed

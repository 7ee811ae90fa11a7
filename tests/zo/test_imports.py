"""The library stands on torch alone."""

import subprocess
import sys

from tests import ROOT

SCRIPT = """
import sys
import smezo_cli.zo.optimizer
print([m for m in sys.modules if m.split(".")[0] in {names}])
print(sorted(m for m in sys.modules if m.startswith("smezo_cli") and not
m.startswith("smezo_cli.zo")))
import torch
from smezo_cli.methods.mezo import MeZO
x = torch.nn.Linear(3, 1)
MeZO(x, lr=1e-3, eps=1e-3).step(lambda: x(torch.ones(2, 3)).sum())
print("numba" in sys.modules)
"""


def test_the_library_loads_torch_alone() -> None:
    """Neither Hydra nor transformers, nothing else of smezo; Numba and Triton for passes only.

    Nor does a step by eager passes: Numba's import takes a second.
    """
    names = {"hydra", "omegaconf", "yaml", "transformers", "numba", "triton"}
    names |= {"datasets", "pydantic"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(names=names)],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == ["[]", "['smezo_cli']", "False"]

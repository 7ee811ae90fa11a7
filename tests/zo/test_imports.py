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
"""


def test_the_library_loads_torch_alone() -> None:
    """Neither Hydra nor transformers, nothing else of smezo; Numba and Triton for passes only."""
    names = {"hydra", "omegaconf", "yaml", "transformers", "numba", "triton"}
    names |= {"datasets", "pydantic"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(names=names)],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == ["[]", "['smezo_cli']"]

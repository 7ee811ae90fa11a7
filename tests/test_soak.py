"""A short soak: faults of many kinds in real runs, and no bit of them is different."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests import ROOT


def test_runs_that_suffer_faults_end_as_if_they_had_not(tmp_path: Path) -> None:
    """None is lost or different, no fault shows a traceback. 500: python scripts/soak.py."""
    words = [str(ROOT / "scripts" / "soak.py"), "--faults", "12", "--seed", "0"]
    found = subprocess.run(
        [sys.executable, *words, "--json", str(tmp_path / "soak.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    report = json.loads((tmp_path / "soak.json").read_text())
    assert (report["faults"], report["lost"], report["different"]) == (12, 0, 0)
    assert len(report["kinds"]) >= 12

"""A short soak: faults of many kinds in real runs, and no bit of them is different."""

import json
import sys
from pathlib import Path

from tests import ROOT
from tests.run.processes import smezo


def soak(words: list[str]) -> int:
    """Be scripts/soak.py, in a process that has imported most of what it needs."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import soak

    return int(soak.main(words))


def test_runs_that_suffer_faults_end_as_if_they_had_not(tmp_path: Path) -> None:
    """None is lost or different, no fault shows a traceback. 500: python scripts/soak.py."""
    words = ["--faults", "12", "--seed", "0", "--json", "soak.json"]
    found = smezo(words, tmp_path, program=soak)
    assert found.code == 0, found.out + found.err
    report = json.loads((tmp_path / "soak.json").read_text())
    assert (report["faults"], report["lost"], report["different"]) == (12, 0, 0)
    assert len(report["kinds"]) >= 12

"""Tests: claims about smezo, in folders that mirror the package."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"

# Two threads on cores that others use, too, would wait for each other by running: that takes more
# of them than the work. Torch's OpenMP reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

"""Load a file of scripts/ as a module."""

import importlib.util
from types import ModuleType

from tests import ROOT


def script(name: str) -> ModuleType:
    """Return scripts/NAME.py as a module of its own, executed but for its `main`."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

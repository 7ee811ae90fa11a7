"""The parts of smezo that cases call, by name: `product.load_model` and so on.

They are imported when they are first asked for, for then HOME and the caches are the fuzzer's own.
"""

import importlib
from typing import Any

_MODULES = {
    "main": "smezo_cli.cli",
    "check": "smezo_cli.config.settings",
    "compose": "smezo_cli.config.compose",
    "grid": "smezo_cli.config.compose",
    "UserError": "smezo_cli.errors",
    "sealed": "smezo_cli.files.sealed",
    "load_model": "smezo_cli.models.load",
    "tensors_digest": "smezo_cli.store.saved",
    "encode": "smezo_cli.scoring.candidates",
    "CONF_DIR": "smezo_cli.config.fixed",
    "plain": "smezo_cli.config.fixed",
    "load": "smezo_cli.report.table",
    "load_task": "smezo_cli.tasks.load",
    "Prompt": "smezo_cli.tasks.base",
    "fingerprint": "smezo_cli.tasks.base",
    "unlabelled": "smezo_cli.tasks.own",
}
# Names in it that a file of settings must never reach.
WRITERS = ("smezo_cli.files.atomic.write_text", "smezo_cli.store.folder.shutil.rmtree")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"fuzz.product lists no {name}")
    return getattr(importlib.import_module(_MODULES[name]), name)

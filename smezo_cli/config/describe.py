"""Say which command makes a run, which recipe set its values, and which job of a sweep it is."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from smezo_cli.config import searchpath
from smezo_cli.errors import redacted
from smezo_cli.words import typed


def is_sweep() -> bool:
    """Return whether the job that runs now belongs to a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def redact_sweep() -> None:
    """Take secrets out of the multirun.yaml that Hydra has written of the command line."""
    from hydra.core.hydra_config import HydraConfig

    if not is_sweep():
        return
    file = Path(HydraConfig.get().sweep.dir) / "multirun.yaml"
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8")
    if (clean := redacted(text)) != text:
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_text(clean, encoding="utf-8")
        os.replace(partial, file)


@contextlib.contextmanager
def as_command_line(argv: Sequence[str]) -> Iterator[None]:
    """Let Hydra read these words as its command line, and raise errors rather than print them."""
    old_argv, old_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [sys.argv[0], *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = old_argv
        if old_full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = old_full


def which_job() -> str:
    """Return "job 2 (seed=1): " in a sweep, "" in a single run."""
    from hydra.core.hydra_config import HydraConfig

    if not is_sweep():
        return ""
    node = HydraConfig.get()
    return f"job {node.job.num} ({' '.join(map(typed, node.overrides.task))}): "


def command() -> str:
    """Return the command line of the job that runs now (in a sweep: of that job alone), or ""."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return ""
    node = HydraConfig.get()
    search = searchpath.of_run(node.runtime.config_sources)
    return shlex.join(["smezo", "train", *search.as_typed, *map(typed, node.overrides.task)])


def replaced() -> list[str]:
    """Return a line for each file of the user that replaces smezo's own in the present job."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return []
    runtime = HydraConfig.get().runtime
    return searchpath.replaced(searchpath.of_run(runtime.config_sources), runtime.choices)


def recipes() -> list[str]:
    """Return the names of the recipes of the job that runs now, in order: the later one wins."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return []
    runtime = HydraConfig.get().runtime
    names = [
        f"{prefix}{name}"
        for group, prefix in (("recipe/shared", "shared/"), ("recipe", ""))
        if (name := runtime.choices.get(group)) is not None
    ]
    # Hydra records an optional default as chosen even where there is no such file.
    folders = [Path(source.path, "recipe") for source in runtime.config_sources]
    return [n for n in names if any((folder / f"{n}.yaml").is_file() for folder in folders)]

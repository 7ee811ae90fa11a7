"""Launch what a command line asks for: check it before anything heavy loads, then call the jobs.

Hydra composes (conf/train.yaml says in which order). The checks are ours, so that every mistake is
one sentence and exit code 2, in a sweep before its first run.
"""

import contextlib
import io
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from smezo_cli.config import fork, search, sweep
from smezo_cli.config.command_line import Request
from smezo_cli.config.compose import prepare
from smezo_cli.config.composer import without_hydra
from smezo_cli.config.describe import (
    as_command_line,
    is_sweep,
    redact_sweep,
    which_job,
)
from smezo_cli.config.fixed import CONF_DIR, sentence
from smezo_cli.config.help import help
from smezo_cli.config.searchpath import VERSION_BASE
from smezo_cli.errors import Diverged, UserError, redacted
from smezo_cli.machine import process, streams, torchrun

_SEVERITY = {0: 0, 2: 1, 1: 2}  # of an exit code: done, refused, crashed; any other is worse


def launch(argv: Sequence[str], run: Callable[[DictConfig], object]) -> int:
    """Check a command line, then call `run` once, or let Hydra call it for each job of a sweep.

    Jobs of a sweep have processes of their own (smezo_cli/config/fork.py), unless torch is loaded
    here. A job that fails does not stop the others. Returns 0, 1 (a crash), 2 (the user's or the
    machine's fault) or 130 (interrupted); of a sweep the worst of its jobs, whatever launches them.
    """
    try:
        request = prepare(argv)
        if "--help" in request.flags:
            print(help(request), end="")
            return 0
        torchrun.check_launcher(request.overrides)
    except UserError as error:
        _say(str(error))
        return 2
    if request.starts_runs:
        streams.guard()
        streams.outlast()
    else:  # a run says these lines itself, in its console.log too
        for line in request.replaced:
            _say(line)
    if request.launcher != "basic":
        process.interruptible()  # it has other processes to end
    from hydra.core.hydra_config import HydraConfig

    codes = [0]
    try:
        if request.alone is not None and request.starts_runs:
            _alone(request.alone, request.overrides, _job(run, codes))
        else:
            codes.append(_by_hydra(request, _job(run, codes)))
    except KeyboardInterrupt:
        return 130
    finally:
        HydraConfig.instance().cfg = None  # else a later run in this process would read it
        for ended in sweep.settle():
            codes.append(ended.code)
            if ended.words:
                _say(ended.words)
    return worst(codes)


def worst(codes: Iterable[int]) -> int:
    """Return the worst of some exit codes: a crash is worse than a refusal."""
    return max(codes, key=lambda code: _SEVERITY.get(code, 3))


def _alone(
    whole: DictConfig, overrides: Sequence[str], job: Callable[[DictConfig], object]
) -> None:
    """Call `job` with settings that are composed already; Hydra would compose them twice more."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    whole.hydra.mode = RunMode.RUN
    whole.hydra.overrides.task = list(overrides)  # as they were typed, not groups first
    HydraConfig.instance().set_config(whole)
    job(without_hydra(whole))


def _by_hydra(request: Request, job: Callable[[DictConfig], object]) -> int:
    """Have Hydra call `job`; return an exit code for what fails outside the jobs, else 0."""
    import hydra

    said = io.StringIO()
    quiet = contextlib.redirect_stderr(said) if request.package else contextlib.nullcontext()
    waiting = sweep.waiting(request.launcher)
    searching = search.searching() if request.is_search else contextlib.nullcontext()
    line = [*request.flags, *request.overrides]
    try:
        start = hydra.main(
            config_path=str(CONF_DIR), config_name="train", version_base=VERSION_BASE
        )
        used = request.search.used()
        with as_command_line(line), quiet, waiting, searching, used, sweep.params_as_words():
            start(job)()
    except UserError as error:
        _say(str(error))
        return 2
    except BrokenProcessPool:
        _say(f"a worker process was killed, and {request.launcher} ended the others: {sweep.GO_ON}")
        return 1
    except (hydra.errors.HydraException, OmegaConfBaseException) as error:
        _say(sentence(error))
        return 2
    except SystemExit as error:
        if said.getvalue():  # by Hydra, of a node that is not there
            _say(
                f"--package {request.package}: the settings have no such node, or nothing in it; "
                "smezo train --cfg job shows them."
            )
            return 2
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except Exception as error:  # not of a job, which catches its own
        if request.launcher == "basic":
            raise
        _say(f"hydra/launcher={request.launcher}: {sentence(error)}")
        return 2
    return 0


def _job(run: Callable[[DictConfig], object], codes: list[int]) -> Callable[[DictConfig], object]:
    """Return the function that Hydra calls for each job, here or in a process of a launcher.

    Args:
        run: what the job does.
        codes: takes the exit codes of the jobs that run in this process, or in a copy of it.
    """
    parent, reader = sweep.here(), sweep.reader()

    def job(cfg: DictConfig) -> sweep.Ended | float | None:
        if sweep.here() != parent:
            streams.guard()
            streams.outlast()
            code, words, value = _attempt(run, cfg)
            return sweep.Ended(code, "" if sweep.reader() == reader else words) if code else value
        if is_sweep() and fork.can_fork():
            code, value = fork.in_own_process(lambda: _attempt(run, cfg)[::2])
            if code < 0:
                name = signal.Signals(-code).name
                memory = " (is there memory enough?)" if name == "SIGKILL" else ""
                _say(f"{which_job()}ended by {name}{memory}; {sweep.GO_ON}")
                code = 1
        else:
            code, _, value = _attempt(run, cfg)
        codes.append(code)
        return value

    return job


def _attempt(run: Callable[[DictConfig], object], cfg: DictConfig) -> tuple[int, str, float | None]:
    """Run a job; return its exit code, what was said if it failed, and its value for a search.

    To a search a run that diverged is an answer, the worst; one that failed has no value.
    """
    direction = search.direction_here()
    try:
        redact_sweep()
        result = run(cfg)
    except UserError as error:
        words = f"{which_job()}{error}"
        _say(words)
        if direction and isinstance(error, Diverged):
            return 0, words, search.worst(direction)
        return 2, words, None
    except Exception as error:  # the boundary of a job: the other jobs of a sweep go on
        sys.stderr.write(traceback.format_exc())
        _say(f"{which_job()}crashed; the error is above.")
        name = type(error).__name__
        return 1, f"{which_job()}crashed ({name}): see {sweep.log_file()}.", None
    if direction is None or not isinstance(result, Mapping):
        return 0, "", None
    return 0, "", search.value_of(result, direction)


def _say(text: str) -> None:
    if (who := torchrun.speaker()) is not None:
        # In one piece: the jobs of a sweep may speak at once.
        sys.stderr.write(f"smezo: {who}{redacted(text)}\n")
        sys.stderr.flush()

"""Search settings by optuna: ask for the settings of a run, run it, tell what it came to.

Hydra's plugin hydra-optuna-sweeper is what the line chooses (hydra/sweeper=optuna). Its loop is
replaced by :class:`Search`, because a search of smezo that is repeated must go on: runs are kept
and the sampler is seeded, so the same search proposes the same settings again, finds those runs
finished and takes their values.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
from omegaconf import DictConfig, OmegaConf

from smezo_cli.config import searchpath
from smezo_cli.config.fixed import sentence
from smezo_cli.errors import UserError, redacted
from smezo_cli.files.atomic import write_text
from smezo_cli.words import quoted, typed

NAME = "optuna"
FILE = "search"  # in conf/hydra/sweeper, where a file named as the plugin's node could not stand
INSTALL = (
    "python -m pip install 'hydra-optuna-sweeper>=1.3,<1.4' 'optuna>=2.10.1,<3' "
    "'sqlalchemy>=1.4.50,<2' 'alembic<1.16'"  # as pyproject.toml's extra
)
SAMPLERS = ("tpe", "random", "cmaes", "nsgaii", "motpe")

_PLUGIN = "hydra_plugins.hydra_optuna_sweeper"
_STORAGE = "sqlite:///"
_OF_THE_ROWS = ("seed", "data_seed", "task")


# --- before the first run --------------------------------------------------------------------


def register() -> None:
    """Have hydra/sweeper=optuna mean smezo's file, in place of the plugin's own values."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(group="hydra/sweeper", name=NAME, node={"defaults": [FILE]})


def asked(hydra: DictConfig) -> bool:
    """Return whether Hydra's node, composed, asks for a search."""
    return str(hydra.sweeper.get("_target_")).startswith(_PLUGIN)


def check_installed(group: str, chosen: str) -> None:
    """Raise UserError for a sweeper or sampler of optuna that is not to be had."""
    if importlib.util.find_spec("hydra_plugins") is None or not importlib.util.find_spec(_PLUGIN):
        raise UserError(
            f"{group}={chosen} needs packages that are not installed: {INSTALL} (in a checkout of "
            "smezo: python -m pip install -e '.[optuna]')."
        )
    if group == "hydra/sweeper/sampler" and chosen not in SAMPLERS:
        grid = "; a grid is a sweep without hydra/sweeper=optuna" if chosen == "grid" else ""
        raise UserError(f"{group}={chosen} must be one of {', '.join(SAMPLERS)}{grid}.")


def check_node(node: Mapping[str, Any], launched_by_torchrun: bool) -> None:
    """Check hydra.sweeper of a search, composed.

    Raises:
        UserError: naming the key.
    """
    at = "hydra.sweeper"
    if launched_by_torchrun:
        raise UserError(
            "hydra/sweeper=optuna: each rank of torchrun would search by itself: start the search "
            "without torchrun."
        )
    for key in ("n_trials", "n_jobs"):
        if not isinstance(node.get(key), int) or isinstance(node[key], bool) or node[key] < 1:
            raise UserError(f"{at}.{key}={node.get(key)} must be a whole number from 1.")
    if node.get("direction") not in ("minimize", "maximize"):
        raise UserError(
            f"{at}.direction={node.get('direction')} must be minimize (the dev loss) or maximize "
            "(the dev metric)."
        )
    storage = node.get("storage")
    if storage is not None and not str(storage).startswith(_STORAGE):
        raise UserError(f"{at}.storage={redacted(str(storage))} must be {_STORAGE}FILE or null.")
    for key, fixed in (
        ("max_failure_rate", 1.0),
        ("search_space", None),
        ("custom_search_space", None),
    ):
        if node.get(key) != fixed:
            raise UserError(f"{at}.{key} is smezo's own: leave it out; ranges are KEY=VALUE.")


def ends_of(override: Any) -> list[str]:
    """Return both ends of an interval as lines KEY=VALUE, which are checked as values are.

    Raises:
        UserError: nothing lies between them, or no logarithm.
    """
    text, value, key = override.input_line, override.value(), override.get_key_element()
    low, high = value.start, value.end
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        example = f"{high}, {low}" if high < low else "1e-5, 1e-3"
        raise UserError(
            f"{text}: an interval has two numbers, and the first is the smaller one: write "
            f"'{key}=interval({example})'."
        )
    if "log" in value.tags and low <= 0:
        raise UserError(
            f"{text}: a logarithmic interval begins above 0: write "
            f"'{key}=tag(log, interval({abs(high) / 100:g}, {abs(high):g}))'."
        )
    if unknown := sorted(set(value.tags) - {"log"}):
        raise UserError(
            f"{text}: there is no tag {unknown[0]}: write "
            f"'{key}=tag(log, interval({low}, {high}))'."
        )
    return [f"{key}={value.start}", f"{key}={value.end}"]


def check_searched(overrides: Sequence[Any]) -> None:
    """Raise UserError for several values of a key whose runs cannot be compared by their loss.

    Also if the line asks for a search, and there is nothing to choose from.
    """
    searched = [override for override in overrides if override.is_sweep_override()]
    for override in searched:
        if override.key_or_group.partition(".")[0].partition("/")[0] in _OF_THE_ROWS:
            raise UserError(
                f"{override.input_line}: a search compares the losses of runs, which must be of "
                f"the same rows and seed: give {override.key_or_group} one value, or leave out "
                "hydra/sweeper=optuna for a sweep over all of them."
            )
    if not searched and any(override.key_or_group == "hydra/sweeper" for override in overrides):
        raise UserError(
            "hydra/sweeper=optuna: there is nothing to choose from: give a range, such as "
            "'lr=tag(log, interval(1e-5, 1e-3))'."
        )


# --- what a run came to ----------------------------------------------------------------------


def value_of(result: Mapping[str, Any], direction: str) -> float | None:
    """Return what a search compares: the dev loss, or the dev metric, of the weights tested.

    None of a run that is not finished; the worst where the number is not finite.

    Args:
        result: content of result.json.
        direction: "minimize" takes the loss, "maximize" the metric.
    """
    if result.get("status") != "done":
        return None
    best = (result.get("dev") or {}).get("best") or {}
    value = best.get("loss" if direction == "minimize" else result.get("metric"))
    return worst(direction) if value is None or not math.isfinite(value) else float(value)


def worst(direction: str) -> float:
    """Return the value of a run that diverged."""
    return math.inf if direction == "minimize" else -math.inf


def direction_here() -> str | None:
    """Return the direction of the search that the job of this process belongs to, or None."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    sweeper = HydraConfig.get().sweeper
    return str(sweeper.direction) if sweeper._target_.startswith(_PLUGIN) else None


# --- the search ------------------------------------------------------------------------------


@contextlib.contextmanager
def searching() -> Iterator[None]:
    """Have Hydra's plugin search by :class:`Search`, without warnings of optuna and SQLAlchemy."""
    from unittest import mock  # which imports much

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import optuna
        from hydra_plugins.hydra_optuna_sweeper import _impl

        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(logging.ERROR)
        try:
            with mock.patch.object(_impl, "OptunaSweeperImpl", Search):
                yield
        finally:
            optuna.logging.set_verbosity(before)


class Search:
    """Ask optuna for settings, launch the runs, tell it their values.

    Args:
        sampler: of optuna, seeded.
        direction: "minimize" or "maximize".
        storage: URL of the file that the study is written to; None: it is in memory alone.
        study_name: its name, before the digest of what is searched.
        n_trials: runs in all.
        n_jobs: runs that are asked for, and launched, at once.
        max_failure_rate: is not used, nor are the two that name a space elsewhere.
        search_space: see above.
        custom_search_space: see above.
        params: KEY: what it may be, as the words of a line, which win over it.
    """

    def __init__(
        self,
        sampler: Any,
        direction: str,
        storage: str | None,
        study_name: str | None,
        n_trials: int,
        n_jobs: int,
        max_failure_rate: float,
        search_space: object,
        custom_search_space: object,
        params: Mapping[str, Any] | None,
    ) -> None:
        self._sampler, self._direction, self._storage = sampler, direction, storage
        self._name, self._num, self._at_once = study_name or "search", n_trials, n_jobs
        self._params = params or {}

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """Take the launcher, as Hydra's sweepers do."""
        from hydra.core.plugins import Plugins

        self._config, self._folder = config, Path(config.hydra.sweep.dir)
        self._launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: Sequence[str]) -> None:
        """Run the trials; one that diverged counts as the worst, one that failed says nothing.

        Args:
            arguments: the words of the line, less those for Hydra.
        """
        space, fixed = self._space(arguments)
        if not space:  # a run of a search, by its own command
            self._launcher.launch([fixed], initial_job_idx=0)
            return
        name = self._named(space, fixed)
        with self._locked(name):
            self._run(self._study(name), space, fixed)

    def _run(self, study: Any, space: Mapping[str, Any], fixed: Sequence[str]) -> None:
        from optuna.trial import TrialState

        for first in range(0, self._num, self._at_once):
            numbers = range(first, min(first + self._at_once, self._num))
            trials = [study.ask(space) for _ in numbers]
            lines = [[*fixed, *_words(trial)] for trial in trials]
            jobs = self._launcher.launch(lines, initial_job_idx=first)
            for number, trial, job in zip(numbers, trials, jobs, strict=True):
                value = job.return_value  # if it failed None, or an Ended of another process
                if isinstance(value, float):
                    study.tell(trial, value)
                    self._say(number, value, study)
                else:
                    study.tell(trial, state=TrialState.FAIL)
                    self._say(number, None, study)
        self._close(study, fixed)

    def _space(self, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Return the distributions of the keys that are searched, and the words of the others."""
        from hydra.core.override_parser.overrides_parser import OverridesParser

        given = OverridesParser.create().parse_overrides(list(arguments))
        typed = {override.key_or_group for override in given}
        more = [
            quoted(f"{key}={value}")
            for key, value in self._params.items()
            if key.lstrip("+") not in typed
        ]
        given += OverridesParser.create().parse_overrides(more)
        space = {o.get_key_element(): distribution(o) for o in given if o.is_sweep_override()}
        return space, [str(o.input_line) for o in given if not o.is_sweep_override()]

    def _named(self, space: Mapping[str, Any], fixed: Sequence[str]) -> str:
        """Return the name of the study: that of another search is another one."""
        sampler = OmegaConf.to_container(self._config.hydra.sweeper.sampler)
        searched = {key: repr(of) for key, of in space.items()}
        asked = [searched, sorted(fixed), sampler, self._direction]
        short = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self._name}-{short}"

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the study while the search goes on, so that the same command does not begin it anew.

        Raises:
            UserError: another process has it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self._folder / f".{name}.lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{self._folder}: another process is at this search ({name}): wait for it, or add "
                "name=NAME."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _study(self, name: str) -> Any:
        """Begin the study; one of that name that is in the file is written anew by this one.

        Raises:
            UserError: the file cannot be written.
        """
        import optuna

        try:
            if self._storage is not None:
                with contextlib.suppress(KeyError):
                    optuna.delete_study(name, self._storage)
            return optuna.create_study(
                storage=self._storage,
                sampler=self._sampler,
                study_name=name,
                direction=self._direction,
            )
        except Exception as error:  # of optuna, SQLAlchemy or sqlite3
            raise UserError(
                f"hydra.sweeper.storage={self._storage}: no study can be kept there "
                f"({sentence(error)}): choose another file, or null."
            ) from error

    def _say(self, number: int, value: float | None, study: Any) -> None:
        found = "it failed"
        if value is not None:
            found = f"{self._what} {value:.4f}" if math.isfinite(value) else f"no {self._what}"
        best = _best(study)
        record = f" (the best so far: {best.value:.4f}, trial {best.number + 1})" if best else ""
        print(f"trial {number + 1} of {self._num}: {found}{record}", flush=True)

    @property
    def _what(self) -> str:
        return "dev loss" if self._direction == "minimize" else "dev metric"

    def _close(self, study: Any, fixed: Sequence[str]) -> None:
        """Say which trial was the best, and write it to optimization_results.yaml as others do."""
        best = _best(study)
        if best is None:
            print(f"search: none of {self._num} trials came to a {self._what}", flush=True)
            return
        searched = searchpath.of_run(self._config.hydra.runtime.config_sources)
        proposed = {typed(key): value for key, value in _proposed(best).items()}
        found = {"name": NAME, "best_params": proposed, "best_value": best.value}
        text = OmegaConf.to_yaml(OmegaConf.create(found))
        write_text(self._folder / "optimization_results.yaml", redacted(text))
        words = [*searched.as_typed, *map(typed, [*fixed, *_words(best)])]
        line = redacted(shlex.join(["smezo", "train", *words]))
        print(
            f"search: the best of {self._num} trials is {best.number + 1}, {self._what} "
            f"{best.value:.4f}\n  {line}",
            flush=True,
        )


def _best(study: Any) -> Any:
    """Return the best trial; None if none came to a finite value."""
    has_value = any(
        trial.value is not None and math.isfinite(trial.value) for trial in study.trials
    )
    return study.best_trial if has_value else None


def distribution(override: Any) -> Any:
    """Return optuna's distribution for KEY=choice(...), range(...) or interval(...)."""
    from optuna import distributions as of

    value = override.value()
    if override.is_interval_sweep():
        is_whole = isinstance(value.start, int) and isinstance(value.end, int)
        if "log" in value.tags:
            among: Any = of.IntLogUniformDistribution if is_whole else of.LogUniformDistribution
        else:
            among = of.IntUniformDistribution if is_whole else of.UniformDistribution
        return among(value.start, value.end)
    return of.CategoricalDistribution(list(override.sweep_string_iterator()))


def _proposed(trial: Any) -> dict[str, Any]:
    """Return the settings that a trial proposes, with digits that a person can type."""
    return {
        key: float(f"{value:.6g}") if isinstance(value, float) else value
        for key, value in trial.params.items()
    }


def _words(trial: Any) -> list[str]:
    return [f"{key}={value}" for key, value in _proposed(trial).items()]

"""Searches by optuna: what is proposed, what a repeated search does, what is refused before it."""

import importlib.util
import json
import math
import pickle
import shlex
import sqlite3
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from smezo_cli.cli.verbs import main
from smezo_cli.config import fork, search, sweep
from smezo_cli.config.launch import _job, launch
from smezo_cli.config.sweep import Ended
from smezo_cli.errors import Diverged, UserError
from tests import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None,
    reason="hydra-optuna-sweeper is not installed",
)

SMALL = (
    "task=toy task.num_train=16 task.num_dev=8 task.num_test=8 task.prompt=0 model=tiny-llama "
    "device=cpu batch_size=4 steps=2 eval_every=1"
)
LOG_LR = "'lr=tag(log, interval(1e-5, 1e-1))'"
OPTUNA = f"-m {SMALL} hydra/sweeper=optuna hydra.sweeper.n_trials=3 {LOG_LR}"


@pytest.fixture(autouse=True)
def _here(one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> Iterator[None]:
    """Import optuna once as a search does: SQLAlchemy warns while it is imported."""
    with search.searching():
        yield


Runs = list[dict[str, Any]]


def searched(words: str, loss: Callable[[DictConfig], float]) -> tuple[int, Runs]:
    """Exit code, and the settings of each run, of a search whose runs come to `loss`."""
    runs: Runs = []

    def run(cfg: DictConfig) -> dict[str, Any]:
        runs.append({key: cfg[key] for key in ("lr", "eps", "sparsity") if key in cfg})
        best = {"step": 1, "loss": loss(cfg), "accuracy": 1 - loss(cfg)}
        return {"status": "done", "metric": "accuracy", "dev": {"best": best}}

    return launch(shlex.split(words), run), runs


def distance(cfg: DictConfig) -> float:
    """A loss that is the lowest at lr 1e-3."""
    return abs(math.log10(cfg.lr) + 3)


def results() -> Any:
    return OmegaConf.to_container(OmegaConf.load("runs/default/optimization_results.yaml"))


def test_the_best_is_the_lowest_loss_and_its_command_makes_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, runs = searched(OPTUNA, distance)
    assert (code, len(runs)) == (0, 3)
    assert all(1e-5 <= run["lr"] <= 1e-1 for run in runs)
    losses = [abs(math.log10(run["lr"]) + 3) for run in runs]
    best = losses.index(min(losses))
    assert results()["best_params"] == {"lr": runs[best]["lr"]}
    out, err = capsys.readouterr()
    assert err == ""
    assert f"the best of 3 trials is {best + 1}, dev loss {min(losses):.4f}" in out
    again, (alone,) = searched(out.splitlines()[-1].partition("train ")[2], distance)
    assert (again, alone["lr"]) == (0, runs[best]["lr"])


def test_the_command_of_the_best_names_the_folder_of_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine" / "task").mkdir(parents=True)
    (tmp_path / "mine" / "task" / "own.yaml").write_text("defaults: [toy, _self_]\nname: own\n")
    code, _ = searched(f"--config-dir {tmp_path / 'mine'} {OPTUNA} task=own", distance)
    assert code == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"smezo train --config-dir {tmp_path / 'mine'} " in line
    assert searched(line.partition("train ")[2], distance)[0] == 0


def test_the_best_names_fields_of_an_adapter_as_they_are_typed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = OPTUNA.replace(LOG_LR, "method=mezo_peft 'method.adapter.config.r=choice(2,4)'")
    assert searched(words, lambda cfg: 1 / cfg.method.adapter.config.r)[0] == 0
    assert results()["best_params"].keys() == {"method.adapter.config.r"}
    line = capsys.readouterr().out.splitlines()[-1]
    assert " method.adapter.config.r=" in line
    assert (
        searched(line.partition("train ")[2], lambda cfg: 1 / cfg.method.adapter.config.r)[0] == 0
    )


def test_maximize_takes_the_dev_metric() -> None:
    _, runs = searched(f"{OPTUNA} hydra.sweeper.direction=maximize", distance)
    losses = [abs(math.log10(run["lr"]) + 3) for run in runs]
    assert results()["best_value"] == pytest.approx(1 - min(losses))


# --- the loop alone --------------------------------------------------------------------------


class Launcher:
    """Stands for Hydra's: a run comes to what `loss` makes of its lr."""

    def __init__(self, loss: Callable[[float], Any]) -> None:
        self.loss, self.runs = loss, list[dict[str, str]]()

    def launch(self, lines: list[list[str]], initial_job_idx: int) -> list[Any]:
        given = [dict(word.split("=") for word in line) for line in lines]
        self.runs += given
        return [SimpleNamespace(return_value=self.loss(float(words["lr"]))) for words in given]


def looped(
    loss: Callable[[float], Any],
    num: int,
    *,
    sampler: str = "tpe",
    words: Sequence[str] = (),
    at_once: int = 1,
    storage: str | None = None,
    name: str | None = None,
    **of_sampler: Any,
) -> list[dict[str, str]]:
    """The runs of a search, in order."""
    from optuna import samplers

    kinds = {kind.lower(): getattr(samplers, kind) for kind in samplers.__all__}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in a search
        of = kinds[f"{sampler}sampler"](seed=0, **of_sampler)
        mine = search.Search(of, "minimize", storage, name, num, at_once, 1.0, None, None, None)
        node = {"hydra": {"sweeper": {"sampler": of_sampler}, "sweep": {"dir": "runs/default"}}}
        node["hydra"]["runtime"] = {"config_sources": []}
        mine._config, mine._folder = OmegaConf.create(node), Path("runs/default")
        mine._launcher = launcher = Launcher(loss)
        mine.sweep(["lr=tag(log, interval(1e-5, 1e-1))", "sparsity=interval(0, 0.5)", *words])
    return launcher.runs


def far(lr: float) -> float:
    return abs(math.log10(lr) + 3)


def test_a_repeated_search_proposes_the_same_and_more_trials_are_its_continuation() -> None:
    """Also behind the first two, which the sampler draws without looking at what came before."""
    Path("runs/default").mkdir(parents=True)
    file = "sqlite:///runs/default/optuna.db"
    short, whole, again, kept = (
        looped(far, num, n_startup_trials=2, storage=storage)
        for num, storage in ((4, None), (6, None), (6, file), (6, file))
    )
    assert whole[:4] == short
    assert whole == again == kept
    other = looped(lambda lr: -far(lr), 6, n_startup_trials=2)
    assert other[:2] == whole[:2]
    assert other[2:] != whole[2:]  # proposals follow the values


def test_the_study_is_a_file_in_which_each_trial_is_there_once() -> None:
    Path("runs/default").mkdir(parents=True)
    file = "sqlite:///runs/default/optuna.db"
    looped(far, 2, storage=file)
    looped(far, 3, storage=file)
    looped(far, 2, storage=file, name="mine", words=["eps=1e-2"])
    with sqlite3.connect("runs/default/optuna.db") as db:
        names = [name for (name,) in db.execute("select study_name from studies")]
        states = [state for (state,) in db.execute("select state from trials")]
    assert sorted(name.rpartition("-")[0] for name in names) == ["mine", "search"]
    assert states == ["COMPLETE"] * 5


@pytest.mark.parametrize("sampler", search.SAMPLERS)
def test_a_search_goes_on_behind_a_run_that_diverged_or_failed(
    sampler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under every sampler, also where it models what it was told."""

    def fails(lr: float) -> float | Ended:
        if lr < 5e-4:
            return Ended(1, "it was killed")
        return math.inf if lr > 2e-3 else far(lr)

    looped(fails, 25, sampler=sampler, at_once=2)
    out = capsys.readouterr().out
    assert 0 < out.count("no dev loss") < 25 - out.count("it failed")
    assert 5e-4 <= results()["best_params"]["lr"] <= 2e-3


def test_a_failure_is_told_as_one_and_a_repeated_search_proposes_the_same_again() -> None:
    """A full disk says nothing of the settings: the proposals are not those of the worst value."""
    Path("runs/default").mkdir(parents=True)
    file = "sqlite:///runs/default/optuna.db"

    def ends(value: Any) -> Callable[[float], Any]:
        return lambda lr: value if lr > 1e-3 else far(lr)

    failed, again, diverged = (
        looped(ends(value), 12, n_startup_trials=2, storage=storage)
        for value, storage in ((None, file), (Ended(1), None), (math.inf, None))
    )
    assert failed == again != diverged
    with sqlite3.connect("runs/default/optuna.db") as db:
        states = [state for (state,) in db.execute("select state from trials")]
    assert [state == "FAIL" for state in states] == [float(r["lr"]) > 1e-3 for r in failed]


def test_several_at_once_are_proposed_before_any_is_run() -> None:
    """The second does not follow from the first: under the same seed both are other numbers."""
    two = looped(far, 5, at_once=2, n_startup_trials=1)
    assert len({run["lr"] for run in two}) == 5
    assert looped(far, 5, at_once=2, n_startup_trials=1) == two
    assert looped(lambda lr: -far(lr), 2, at_once=2, n_startup_trials=1) == two[:2]


def test_a_search_runs_once_at_a_time() -> None:
    def nested(lr: float) -> float:
        with pytest.raises(UserError, match="another process is at this search"):
            looped(far, 1)
        return far(lr)

    assert len(looped(nested, 1)) == 1


# --- under Hydra -----------------------------------------------------------------------------


def test_a_run_that_diverged_is_an_answer_and_one_that_failed_is_told_by_the_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(error: UserError) -> Callable[[DictConfig], float]:
        def loss(cfg: DictConfig) -> float:
            if cfg.lr > 1e-3:
                raise error
            return distance(cfg)

        return loss

    assert searched(OPTUNA, fails(Diverged("train loss is not finite.")))[0] == 0
    out, err = capsys.readouterr()
    assert out.count("no dev loss") == err.count("not finite") > 0
    assert searched(OPTUNA, fails(UserError("no room.")))[0] == 2
    out, err = capsys.readouterr()
    assert out.count("it failed") == err.count("no room") > 0


@pytest.mark.parametrize("code", [0, 2])
def test_where_every_run_diverges_or_fails_that_is_said(
    code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(cfg: DictConfig) -> float:
        raise UserError("no room.") if code else Diverged("train loss is not finite.")

    assert searched(OPTUNA, fails)[0] == code
    assert "none of 3 trials came to a dev loss" in capsys.readouterr().out


def test_an_experiment_names_the_space_and_the_line_wins_over_it() -> None:
    words = f"experiment=search {SMALL} steps=8 hydra.sweeper.n_trials=3"
    _, runs = searched(words, distance)
    assert all(3e-4 <= r["lr"] <= 1e-2 and 0.25 <= r["sparsity"] <= 0.75 for r in runs)
    assert len({run["eps"] for run in runs}) == 3
    _, runs = searched(f"{words} eps=1e-3 'lr=choice(2e-4,3e-4)' name=typed", distance)
    assert {run["eps"] for run in runs} == {1e-3}
    assert {run["lr"] for run in runs} <= {2e-4, 3e-4}


def test_the_command_of_a_run_of_an_experiment_makes_that_run_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As it is printed at the end of a search, and where a run is stopped."""
    words = f"experiment=search {SMALL} steps=8 hydra.sweeper.n_trials=2"
    assert searched(words, distance)[0] == 0
    line = capsys.readouterr().out.splitlines()[-1].partition("train ")[2]
    code, runs = searched(line, distance)
    assert (code, runs) == (0, [results()["best_params"]])
    assert "trial" not in capsys.readouterr().out


@pytest.mark.parametrize("sweeper", ["optuna", "basic"])
def test_a_file_may_name_fields_of_an_adapter(sweeper: str) -> None:
    """They are no settings of the YAML; on the line they need no sign either, which wins."""
    folder = Path("own/experiment")
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        f"# @package _global_\ndefaults: [override /hydra/sweeper: {sweeper}]\n"
        "hydra: {mode: MULTIRUN, sweeper: {params: {method.adapter.config.r: 'choice(2,4)'}}}\n"
    )
    ranks = set()

    def loss(cfg: DictConfig) -> float:
        ranks.add(cfg.method.adapter.config.r)
        return 1 / cfg.method.adapter.config.r

    words = f"{SMALL} method=mezo_peft experiment=mine --config-dir own"
    words += " hydra.sweeper.n_trials=4" if sweeper == "optuna" else ""
    assert searched(words, loss)[0] == 0
    assert ranks == {2, 4}
    ranks.clear()
    assert searched(f"{words} 'method.adapter.config.r=choice(6,8)' name=typed", loss)[0] == 0
    assert ranks == {6, 8}


def test_the_line_may_name_the_space_as_params_of_the_sweeper() -> None:
    """As files do, and as it is checked: before the first run."""
    words = f"-m {SMALL} hydra/sweeper=optuna hydra.sweeper.n_trials=2"
    param = "'+hydra.sweeper.params.lr=\"tag(log, interval(1e-5, {}))\"'"
    code, runs = searched(f"{words} {param.format(1e-1)}", distance)
    assert (code, len({run["lr"] for run in runs})) == (0, 2)
    assert searched(f"{words} {param.format(1e-6)}", distance) == (2, [])


def test_a_word_that_takes_a_setting_out_reaches_every_run() -> None:
    assert searched(f"{OPTUNA} ~recipe", distance)[0] == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            f"-m {SMALL} {LOG_LR}",
            ["an interval is what a search chooses from", "hydra/sweeper=optuna"],
        ),
        (f"{SMALL} hydra/sweeper=optuna lr=1e-3", ["add -m"]),
        (f"-m {SMALL} hydra/sweeper=optuna lr=1e-3", ["nothing to choose from", "interval("]),
        (
            "-m hydra/sweeper=optuna 'lr=tag(log, interval(0, 1e-3))'",
            ["interval(1e-05, 0.001))'"],
        ),
        (
            "-m hydra/sweeper=optuna 'lr=interval(1e-3, 1e-5)'",
            ["'lr=interval(1e-05, 0.001)'"],
        ),
        ("-m hydra/sweeper=optuna 'lr=tag(ln, interval(1e-5, 1e-3))'", ["no tag ln"]),
        ("-m hydra/sweeper=optuna 'sparsity=interval(0.5, 1.5)'", ["sparsity=1.5"]),
        ("-m hydra/sweeper=optuna 'spasity=interval(0.5, 0.9)'", ["sparsity"]),
        ("-m hydra/sweeper=optuna 'steps=interval(10.0, 20.5)'", ["steps"]),
        (
            "-m hydra/sweeper=optuna method=mezo 'sparsity=interval(0.5, 0.9)'",
            ["sparsity", "sparse_mezo"],
        ),
        (f"-m hydra/sweeper=optuna seed=0,1,2 {LOG_LR}", ["seed=0,1,2", "same rows and seed"]),
        (f"-m hydra/sweeper=optuna task=toy,rte {LOG_LR}", ["task=toy,rte", "same rows and seed"]),
        (f"{OPTUNA} hydra.sweeper.n_trials=0", ["n_trials=0", "whole number from 1"]),
        (f"{OPTUNA} hydra.sweeper.direction=up", ["direction=up", "minimize", "maximize"]),
        (f"{OPTUNA} hydra.sweeper.storage=mysql://me:pw@x/y", ["sqlite:///FILE or null"]),
        (f"{OPTUNA} hydra.sweeper.storage=sqlite:///no/where.db", ["no study can be kept there"]),
        (
            f"{OPTUNA} hydra.sweeper.custom_search_space=os.system",
            ["custom_search_space", "smezo's own"],
        ),
        (
            f"{OPTUNA} hydra/sweeper/sampler=grid",
            ["sampler=grid", "tpe, random", "without hydra/sweeper"],
        ),
        (
            f"{OPTUNA} hydra.sweeper.sampler._target_=os.system",
            ["_target_=os.system", "sampler of optuna"],
        ),
        (
            "-m hydra/sweeper=optuna 'hydra.sweeper.params.lr=interval(1e-5,1e-3)'",
            ["write 'lr=interval(1e-5,1e-3)'"],
        ),
        (f"{OPTUNA} hydra.sweeper.params.eps=1e-4,1e-3", ["write eps=1e-4,1e-3"]),
        (f"{OPTUNA} hydra.sweeper.n_trails=3", ["n_trails"]),
        (f"-m hydra/sweeper=optunaa {LOG_LR}", ["did you mean optuna"]),
    ],
    ids=lambda value: value[-50:] if isinstance(value, str) else "",
)
def test_a_mistake_is_one_sentence_before_the_first_run(
    words: str, says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, runs = searched(words, distance)
    err = capsys.readouterr().err
    assert (code, runs, err.count("\n")) == (2, [], 1), err
    for part in says:
        assert part in err
    assert "pw" not in err


def test_what_is_not_installed_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where an experiment asks for it: Hydra then finds no sampler."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    Path("own").mkdir()  # with a folder of its own nothing is taken that was composed before
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["sweeper"], "sampler")
    for words in (OPTUNA, f"experiment=search {SMALL} --config-dir own"):
        assert searched(words, distance)[0] == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"are not installed: {search.INSTALL}" in err
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = " ".join(f"'{pin}'" for pin in project["optional-dependencies"]["optuna"])
    assert search.INSTALL.endswith(f"pip install {pins}")


def test_ranks_of_torchrun_do_not_search(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "RANK": "0", "WORLD_SIZE": "2"}
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    assert searched(OPTUNA, distance)[0] == 2
    assert "start the search without torchrun" in capsys.readouterr().err


def test_no_warning_of_optuna_or_sqlalchemy_is_shown(recwarn: pytest.WarningsRecorder) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        searched(OPTUNA, distance)
    assert [w for w in caught if "optuna" in w.filename or "sqlalchemy" in w.filename] == []


def test_a_process_of_its_own_gives_back_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fork.in_own_process(lambda: (0, 0.1)) == (0, 0.1)
    assert fork.in_own_process(lambda: (2, None)) == (2, None)


def test_a_process_of_a_launcher_gives_back_the_value_or_how_it_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As joblib and submitit take it: what a job returns is pickled there and read here."""
    ended = {"lr": 1e-3}

    def run(cfg: DictConfig) -> dict[str, Any]:
        if cfg.lr == 0:
            raise UserError("no room.")
        best = {"loss": 0.25, "accuracy": 0.5}
        return {"status": "done", "metric": "accuracy", "dev": {"best": best}}

    monkeypatch.setattr(search, "direction_here", lambda: "minimize")
    job = _job(run, codes := [])
    monkeypatch.setattr(sweep, "here", lambda: ("another", 1))
    assert pickle.loads(pickle.dumps(job(OmegaConf.create(ended)))) == 0.25
    failed = pickle.loads(pickle.dumps(job(OmegaConf.create({"lr": 0}))))
    assert (type(failed), failed.code, codes) == (Ended, 2, [])
    assert [found.code for found in sweep.settle()] == [2]


def test_finished_runs_are_skipped_and_their_dev_loss_is_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With smezo's own runs: the same search again trains nothing and tells the same losses."""
    words = ["train", *shlex.split(OPTUNA.replace("n_trials=3", "n_trials=2"))]
    assert main(words) == 0
    first = capsys.readouterr().out
    losses = sorted(
        json.loads(file.read_text())["dev"]["best"]["loss"]
        for file in Path("runs/default").glob("*/result.json")
    )
    assert results()["best_value"] == losses[0]
    assert main(words) == 0
    again = capsys.readouterr().out
    assert again.count("done already") == 2
    trials = [[line for line in out.splitlines() if "trial" in line] for out in (first, again)]
    assert trials[0] == trials[1]

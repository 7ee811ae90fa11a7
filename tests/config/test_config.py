"""Settings: what wins, what is refused and how, what a sweep does, what a digest names."""

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf

from smezo_cli.config.build import build
from smezo_cli.config.compose import compose, prepare
from smezo_cli.config.describe import command, is_sweep, recipes, replaced
from smezo_cli.config.digest import digest
from smezo_cli.config.fixed import CONF_DIR, plain
from smezo_cli.config.launch import launch
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.words import quoted

TASK, MODEL = "rotten_tomatoes", "smollm2-135m"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's --config-dir with a task and a method with a recipe for it."""
    folder = tmp_path / "mine"
    for group in ("task", "recipe"):
        (folder / group).mkdir(parents=True)
    (folder / "task" / "mine.yaml").write_text(
        "# My task.\nname: mine\nkind: classification\nsource: {reader: toy}\n"
        "prompts: []\nnum_dev: 5\n"
    )
    (folder / "recipe" / f"mine-{MODEL}-mezo.yaml").write_text(
        "# @package _global_\nsteps: 7\nlr: 0.5\n"
    )
    return folder


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        prepare(argv)
    return str(error.value)


# --- what wins -------------------------------------------------------------------------------


def test_recipe_beats_method_and_command_line_beats_recipe(own: Path) -> None:
    chosen = ["task=mine", "method=mezo"]
    with_recipe = compose(chosen, str(own))
    assert (with_recipe.steps, with_recipe.lr, with_recipe.method.lr) == (7, 0.5, 0.5)
    assert with_recipe.eps == compose(["method=mezo", "~recipe"]).eps
    by_hand = compose([*chosen, "lr=0.25"], str(own))
    assert (by_hand.steps, by_hand.lr, by_hand.method.lr) == (7, 0.25, 0.25)


def test_recipe_follows_the_groups_of_the_command_line(own: Path) -> None:
    """Task, model and method all take part in its name; without one the papers' grid applies."""
    tiny = ["task=mine", "model=tiny-llama"]
    grid = compose([*tiny, "method=mezo"], str(own))
    assert (grid.steps, grid.lr) == (20000, 1e-6)
    assert compose([*tiny, "method=sparse_mezo"], str(own)).steps == 20000
    assert compose([*tiny, "method=adamw"], str(own)).steps == 625


def test_a_recipe_of_a_model_holds_for_any_task_and_yields_to_one_for_the_task(own: Path) -> None:
    """A 135M model must not inherit the 20,000 steps of the papers."""
    words = ["task=mine", "method=sparse_mezo"]
    assert (compose(words, str(own)).steps, compose(words, str(own)).lr) == (200, 1e-4)
    assert compose([*words, "steps=9"], str(own)).steps == 9
    assert compose([*words, "~recipe/model"], str(own)).steps == 20000
    assert compose(["task=mine", "method=mezo"], str(own)).steps == 7  # its own recipe


def test_the_setting_of_the_papers_is_what_a_large_model_gets() -> None:
    """MeZO (arXiv 2305.17333), Table 16, which Sparse-MeZO follows: batch, eps, steps, splits."""
    cfg = check(compose(["task=rte", "model=llama-7b"]))
    assert (cfg.batch_size, cfg.eps, cfg.steps, cfg.eval_every) == (16, 1e-3, 20000, 4000)
    assert [cfg.task[key] for key in ("num_train", "num_dev", "num_test")] == [1000, 500, 1000]
    assert (cfg.sparsity, cfg.lr_schedule, cfg.dtype, cfg.compute_dtype) == (
        *(0.75, "constant"),
        *("float16", None),
    )
    for size in ("13b", "30b", "66b"):
        cfg = check(compose(["task=rte", f"model=opt-{size}", "method=mezo"]))
        assert (cfg.batch_size, cfg.lr, cfg.eps, cfg.steps) == (16, 1e-6, 1e-3, 20000)
        # The largest two are not looked at before the end.
        assert cfg.eval_every == (20000 if size in ("30b", "66b") else 4000)
    cfg = check(compose(["task=rte", "model=opt-13b", "method=adamw"]))
    assert (cfg.batch_size, cfg.lr, cfg.steps, cfg.lr_schedule) == (8, 1e-5, 625, "linear")
    cfg = check(compose(["task=rte", "model=roberta-large", "method=mezo"]))
    assert (cfg.batch_size, cfg.lr, cfg.steps, cfg.eval_every) == (64, 1e-6, 100_000, 10_000)


def test_the_dtype_is_that_of_the_model_unless_one_is_asked_for() -> None:
    assert compose(["task=toy"]).dtype == "float32"
    assert compose(["task=toy", "model=llama3-8b"]).dtype == "bfloat16"
    assert compose(["task=toy", "model=llama3-8b", "dtype=float32"]).dtype == "float32"
    assert check(compose(["task=toy", "compute_dtype=bfloat16"])).compute_dtype == "bfloat16"
    assert check(compose(["task=toy", "+model.compute_dtype=float16"])).compute_dtype == "float16"


def test_default_run_has_a_recipe() -> None:
    assert (CONF_DIR / "recipe" / f"{TASK}-{MODEL}-sparse_mezo.yaml").is_file()
    cfg = compose()
    assert (cfg.task.name, cfg.model.name, cfg.method.name) == (TASK, MODEL, "sparse_mezo")
    assert cfg.steps < 20000


# What the tasks for the user's own data cannot do without; they are named by the file.
OWN_DATA = {
    "classification": ("task.data=classification.csv", "task.prompt='{a}'", "task.labels=[b,c]"),
    "choice": ("task.data=choice.csv", "task.prompt='{a}'", "task.options=[b,c]"),
    "generation": ("task.data=generation.csv", "task.prompt='{a}'"),
}


@pytest.mark.parametrize(
    "choice",
    [
        f"{file.parent.name}={file.stem}"
        for group in ("task", "model", "method", "logger")
        for file in sorted((CONF_DIR / group).glob("*.yaml"))
    ],
)
def test_every_choice_composes(choice: str) -> None:
    group, _, name = choice.partition("=")
    needed = OWN_DATA | {
        "own": ["model.path=x"],
        "mixture": ["task.parts=[toy,rotten_tomatoes]"],
    }
    assert compose([choice, *needed.get(name, ())])[group].name == name


@pytest.mark.parametrize(
    "file", sorted((CONF_DIR / "recipe").glob("*.yaml")), ids=lambda file: file.stem
)
def test_every_recipe_is_that_of_its_groups(file: Path) -> None:
    names = {
        group: sorted((f.stem for f in (CONF_DIR / group).glob("*.yaml")), key=len, reverse=True)
        for group in ("task", "model", "method")
    }
    rest, words = file.stem, []
    for group in ("task", "model", "method"):
        name = next(n for n in names[group] if f"{rest}-".startswith(f"{n}-"))
        words.append(f"{group}={name}")
        rest = rest[len(name) + 1 :]
    assert rest == ""
    cfg = compose(words)
    assert OmegaConf.merge(cfg, OmegaConf.load(file)) == cfg


POINTERS = sorted((CONF_DIR / "recipe/model").glob("*.yaml"))
SHARED = sorted((CONF_DIR / "recipe/shared").glob("*.yaml"))


@pytest.mark.parametrize("file", POINTERS, ids=lambda file: file.stem)
def test_what_a_model_points_at_is_there(file: Path) -> None:
    assert (CONF_DIR / "model" / file.name).is_file()
    (name,) = re.findall(r"optional /recipe/shared: (\S+)-\$\{method\}\n", file.read_text())
    assert any(recipe.stem.rpartition("-")[0] == name for recipe in SHARED)


@pytest.mark.parametrize("file", SHARED, ids=lambda file: file.stem)
def test_a_shared_recipe_reaches_the_models_that_point_at_it(file: Path) -> None:
    name, _, method = file.stem.rpartition("-")
    pointed = [f.stem for f in POINTERS if f"/recipe/shared: {name}-${{method}}" in f.read_text()]
    cfg = compose(["task=toy", f"model={pointed[0]}", f"method={method}"])
    assert OmegaConf.merge(cfg, OmegaConf.load(file)) == cfg


def test_eval_every_defaults_to_a_tenth_of_the_steps_but_at_least_20() -> None:
    words = ["task=toy", "model=tiny-llama"]
    assert check(compose([*words, "steps=1501"])).eval_every == 151
    assert check(compose([*words, "steps=150"])).eval_every == 20
    assert check(compose([*words, "steps=3"])).eval_every == 3
    assert check(compose([*words, "steps=150", "eval_every=40"])).eval_every == 40


def test_settings_have_their_own_types() -> None:
    """1e2 and 1 come from the command line as a float and an int."""
    settings = check(compose(["steps=1e2", "lr=1", "compile=true", "name=7"]))
    assert (settings.steps, settings.lr) == (100, 1.0)
    assert (type(settings.steps), type(settings.lr)) == (int, float)
    assert (settings.compile, settings.name) == (True, "7")


# --- mistakes --------------------------------------------------------------------------------

MISTAKES = [
    # words of the command line, what the one sentence must say
    ("task=rotten_tomatos", ["task=rotten_tomatos", "did you mean rotten_tomatoes"]),
    ("model=smollm-135m", ["did you mean smollm2-135m", "tiny-opt"]),
    ("data=a.csv", ["no setting data", "did you mean task.data (with task=choice or class"]),
    ("model=./mine", ["model=./mine", "model=own model.path=PATH"]),
    ("model=org/some-1b", ["no such model", "model=own model.path=PATH"]),
    ("task=/tmp", ["no such task", "task=classification task.data=FILE"]),
    ("method=mzo", ["did you mean mezo", "smezo ls methods"]),
    ("recipe=none", ["no such recipe", f"{TASK}-{MODEL}-sparse_mezo"]),
    ("recipe=null", ["~recipe"]),
    ("method=null", ["method must be chosen", "method=sparse_mezo"]),
    ("~task", ["task must be chosen"]),
    ("hydra/launcher=basik", ["did you mean basic"]),
    ("hydra/luncher=basic", ["did you mean hydra/launcher"]),
    ("meth/od=mezo", ["no config group meth/od", "method"]),
    ("stpes=3", ["no setting stpes", "did you mean steps", "batch_size"]),
    ("num_queries=2", ["did you mean method.num_queries"]),
    ("method.num_query=2", ["did you mean method.num_queries", "method.mask"]),
    ("hydra.swep.dir=x", ["no setting hydra.swep.dir"]),
    (
        "method=mezo sparsity=0.8",
        ["method mezo has no sparsity", "sparse_mezo", "add method=sparse_mezo"],
    ),
    ("method=adamw eps=1e-3", ["adamw has no eps", "others have: add method=sparse_mezo"]),
    ("method=mezo method.mask=small", ["method mezo has no method.mask", "add method=sparse_mezo"]),
    (
        "method=mezo +sparsity=0.8",
        ["method mezo has no sparsity", "sparse_mezo", "add method=sparse_mezo"],
    ),
    ("+momentum=0.9", ["no setting momentum", "steps"]),
    ("method=sgd method.optimizer.nesterov=true", ["torch.optim.SGD: +method.optimizer.nesterov"]),
    ("method.lr=0.5", ["lr=0.5", "top level"]),
    ("sparsity=1", ["sparsity=1", "[0, 1)", "sparsity=0.75"]),
    ("sparsity=-0.1", ["[0, 1)"]),
    ("eps=0", ["eps=0", "above 0"]),
    ("lr=-1e-4", ["lr=-0.0001", "above 0"]),
    ("lr=high", ["lr=high", "a number above 0"]),
    ("lr=inf", ["lr=inf", "a number above 0"]),
    ("lr=nan", ["lr=nan", "a number above 0"]),
    ("lr=true", ["lr=true", "a number above 0"]),
    ("lr=null", ["lr=null", "a number above 0"]),
    ("steps=0", ["steps=0", "at least 1"]),
    ("steps=1.5", ["a whole number"]),
    ("steps=many", ["steps=many", "a whole number"]),
    ("steps=true", ["steps=true", "a whole number"]),
    ("steps=[1]", ["steps=[1]", "a whole number"]),
    ("batch_size=0", ["batch_size=0", "at least 1"]),
    ("eval_every=0", ["eval_every=0", "at least 1 or null"]),
    ("seed=-1", ["seed=-1", "at least 0"]),
    ("seed=9223372036854775808", ["seed=9223372036854775808", "below 2^63"]),
    ("data_seed=a", ["data_seed=a", "a whole number"]),
    ("device=gpu", ["device=gpu", "auto, cpu, cuda or cuda:N"]),
    ("dtype=fp16", ["dtype=fp16", "float32, bfloat16 or float16"]),
    ("compute_dtype=half", ["compute_dtype=half", "float32, bfloat16 or float16 or null"]),
    ("model=own", ["model.path is needed", "model.path=VALUE"]),
    ("model=own model.path=x model.revision=[a]", ["model.revision", "a branch, a tag or"]),
    ("model=own model.path=x model.family=encoder", ["model.family=encoder", "causal or masked"]),
    ("model=own model.path=x model.attention=fast", ["model.attention=fast", "sdpa", "eager"]),
    ("model=tiny-llama +model.fmily=masked", ["no model.fmily", "did you mean family"]),
    ("compile=yes", ["compile=yes", "auto, true or false"]),
    ("if_exists=skip", ["if_exists=skip", "resume, error or fresh"]),
    ("name=a/b", ["name=a/b", "a folder name"]),
    ("name=..", ["name=..", "a folder name", "its first a letter or a digit"]),
    ("name=.", ["name=.:", "its first a letter or a digit"]),
    ("name=", ["name=:", "a folder name"]),
    ("name=nan", ["nan is read as a number", "\"name='nan'\""]),
    ("name=1e5", ["1e5 is read as the number 100000.0", "\"name='1e5'\""]),
    ("name=1_0", ["1_0 is read as the number 10", "\"name='1_0'\""]),
    ("name=true", ["true is read as the truth value true", "\"name='true'\""]),
    ("name=null", ["null is read as no value", "\"name='null'\""]),
    ("runs_dir=1e3", ["1e3 is read as the number 1000.0", "\"runs_dir='1e3'\""]),
    ("model=own model.path=x model.revision=12e4", ["12e4 is read as", "model.revision='12e4'"]),
    ("-m name=a,nan", ["nan is read as a number"]),
    ("~lr", ["~lr takes lr out, which is needed", "lr=0.0"]),
    ("~lr ~eval_every", ["~lr takes lr out"]),
    ("~lr=1", ["~lr=1 takes lr out", "leave ~lr=1 out"]),
    ("~steps", ["~steps takes steps out", "steps="]),
    ("~task.kind", ["~task.kind takes task.kind out", "task.kind=classification"]),
    ("~method.lr", ["~method.lr takes method.lr out", "leave ~method.lr out"]),
    ("~model.name", ["~model.name takes model.name out", f"model.name={MODEL}"]),
    ("~nothing", ["there is no setting nothing"]),
    ("runs_dir=null", ["runs_dir=null", "the path of a folder"]),
    ("task=rte task.data=a.csv", ["task rte has no task.data", "classification"]),
    ("task=rte +task.data=a.csv", ["task=rte brings its data", "task=classification"]),
    ("task=copa task.labels=[a,b]", ["task copa has no task.labels", "classification"]),
    ("task=copa +task.labels=[a,b]", ["there is no task.labels", "option_template"]),
    ("task=rte task.test_from=dev", ["task.test_from=dev", "test or train"]),
    ("task=rte task.prompt=[a]", ["a template in quotes", "null"]),
    ("task=rte task.kind=regression", ["task.kind=regression", "choice, generation or mixture"]),
    ("task=classification", ["task.data is needed by task=classification", "task.data=my.csv"]),
    ("task=classification task.data=a.csv", ["task.prompt is needed", '"{text} It was"']),
    ("task=classification task.data=a.csv task.prompt={a}", ["task.labels is needed", "{0: ter"]),
    ("task=choice task.data=a.csv task.prompt={a}", ["task.options is needed", "[a,b]"]),
    (
        "task=choice task.data=a.csv task.prompt={a} task.options=3",
        ["task.options=3", "a name or a list of names"],
    ),
    (
        "task=generation task.data=a.csv task.prompt={a} task.columns=b",
        ["task.columns=b", "{text:"],
    ),
    (
        "task=generation task.data=a.csv task.prompt={a} +task.test_from=train",
        ["there is no task.test_from"],
    ),
    ("task=generation task.label=a", ["task generation has no task.label", "classification"]),
    ("task.num_dev=0", ["task.num_dev=0", "at least 1 or null"]),
    ("method.mask=big", ["method.mask=big", "small, large, random or none"]),
    ("method.num_queries=0", ["method.num_queries=0", "at least 1"]),
    ("method.freeze=embed", ["method.freeze=embed", "a list of strings"]),
    ("method=mezo_adam method.betas=0.9", ["method.betas=0.9", "two numbers in [0, 1)"]),
    ("method=mezo_adam method.betas=[0.9,1]", ["[0.9, 1]", "for example method.betas=[0.9,0.999]"]),
    ("method=mezo_adam method.adam_eps=0", ["method.adam_eps=0", "above 0"]),
    (
        "method=mezo method.adam_eps=1e-8",
        ["method mezo has no method.adam_eps", "add method=mezo_adam"],
    ),
    ("method.objective=acc", ["method.objective=acc", "loss, accuracy or f1"]),
    ("method.objective=f1", ["of kind classification", "add method.objective=accuracy"]),
    ("task=squad method.objective=accuracy", ["task squad", "add method.objective=f1"]),
    ("method=sgd method.objective=f1", ["method sgd has no method.objective", "mezo"]),
    ("method.mask=none", ["sparsity=0.5 would be ignored", "sparsity=0"]),
    ("batch_order=by_length", ["batch_order=by_length", "must be shuffled or stratified"]),
    ("method=adamw full_save_every=7", ["the steps of adamw are not recorded", "set eval_every"]),
    (
        "method=grzo method.num_rows=4",
        ["method.num_rows=4", "batch_size=16", "leave it out"],
    ),
    ("task=copa batch_order=stratified", ["each class", "task=copa is of kind choice"]),
    ("method.mask_resample=step", ["method.mask=random"]),
    ("method.mask=random method.mask_refresh_every=5", ["mask_refresh_every=5", "set it to 0"]),
    ("logger=wandb logger.mode=on", ["logger.mode=on", "offline or online"]),
    ("lr=${epsilon}", ["epsilon"]),
    ("seed=0,1", ["several values", "-m"]),
    (TASK, ["not of the form KEY=VALUE", f"task={TASK}"]),
    ("lr", ["not of the form KEY=VALUE"]),
    ("name=[a", ["cannot read", "name=[a"]),
    ("--steps 3", ["unknown flag --steps", "settings have no dashes, as in steps=100"]),
    ("--mutlirun", ["unknown flag --mutlirun", "did you mean --multirun"]),
    ("--cfg jbo", ["--cfg", "jbo", "job"]),
    ("--resolve", ["--cfg job"]),
    ("--package method", ["--cfg job"]),
    ("task.source=7", ["task.source=7", "a mapping that names its reader"]),
    ("task.source.reader=7", ["{'reader': 7", "a mapping that names its reader"]),
    ("--cfg job -m", ["--cfg job shows a single run", "as in smezo train --cfg job."]),
    (
        "-m lr=1e-3,1e-4 seed=choice(3,4) steps=5 --info defaults",
        ["as in smezo train lr=0.001 seed=3 steps=5 --info defaults."],
    ),
    (
        "-m task.labels=[a,b],[c,d] name=[a --cfg job --package task --resolve",
        ["as in smezo train 'task.labels=[a,b]' 'name=[a' --cfg job --package task --resolve."],
    ),
    ("-m --package task", ["--cfg job"]),
    ("-m --resolve", ["--cfg job or --help"]),
    ("model.config=abc", ["model.config=abc", "a mapping of names to values"]),
    ("model.config=7", ["model.config=7", "a mapping of names to values"]),
    ("--config-dir nowhere", ["--config-dir nowhere", "no such folder"]),
    ("--config-dir=", ["--config-dir is empty", "give a folder"]),
    (f"task.name={'a' * 230}", ["task.name=aaa", "255", "give a shorter task.name"]),
    ("model.quantization=4bit", ["model.quantization", "+model.quantization=4bit"]),
]


@pytest.mark.parametrize(("words", "says"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_mistake_is_one_sentence(words: str, says: list[str]) -> None:
    message = refusal(*words.split())
    for part in says:
        assert part in message
    assert "\n" not in message
    assert len(message) < 500
    assert not os.listdir()


def test_mistake_exits_with_2_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["stpes=3"], lambda cfg: pytest.fail("ran")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("smezo: there is no setting stpes")
    assert err.count("\n") == 1


def test_unwritable_runs_dir_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal("runs_dir=file/runs")
    assert "cannot write to file/runs" in message
    assert "runs_dir=PATH" in message


@pytest.mark.parametrize("text", ["name: [mine", "num_dev: 5", "- mine", "name: ${nam}"])
def test_malformed_file_of_the_user_is_refused(text: str, own: Path) -> None:
    (own / "task" / "mine.yaml").write_text(text + "\n")
    message = refusal("--config-dir", str(own), "task=mine")
    assert "\n" not in message
    assert "mine" in message or "task" in message


def test_an_experiment_whose_mode_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nhydra:\n  mode: ${hydra:runtime.cwd}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    message = refusal("--config-dir", str(tmp_path), "experiment=mine")
    assert "experiment=mine: hydra.mode" in message
    assert "MULTIRUN or RUN" in message


def test_full_disk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    assert "has 1 MB free, and a run needs 250 MB" in refusal()


@pytest.mark.parametrize(
    "words",
    [
        "seed=0,1 lr=1e-4,0",
        "method=mezo,sparse_mezo,mzo",
        "method=sparse_mezo,mezo sparsity=0.5",
        "method=mezo,sparse_mezo method.num_queries=1,0",
        f"task={TASK},toys",
        "seed=range(-1,3)",
        "seed=choice()",
    ],
)
def test_sweep_with_one_bad_value_runs_nothing(words: str) -> None:
    assert launch(["-m", *words.split()], lambda cfg: pytest.fail("ran")) == 2
    assert not os.listdir()


def test_a_setting_that_is_not_needed_may_be_taken_out() -> None:
    assert compose(["~eval_every", "~task.num_dev"]).get("eval_every") is None


@pytest.mark.parametrize("text", ["nan", "1e5", "true", "null", "1_0"])
def test_what_is_in_quotes_is_text(text: str) -> None:
    assert check(compose([f"name='{text}'"])).name == text


# --- runs and sweeps -------------------------------------------------------------------------


def test_single_run_leaves_no_trace_of_hydra() -> None:
    seen: list[DictConfig] = []
    argv = list(sys.argv)
    assert launch(["steps=3", "name=a"], seen.append) == 0
    assert [cfg.steps for cfg in seen] == [3]
    assert "hydra" not in seen[0]
    assert sorted(str(p) for p in Path().rglob("*")) == ["runs", "runs/a"]
    assert sys.argv == argv
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_a_single_run_is_composed_once_and_is_what_hydra_would_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a setting of Hydra's own it goes by hydra.main; the job sees the same."""
    composed: list[list[str]] = []
    load = ConfigLoaderImpl.load_configuration

    def counted(self: ConfigLoaderImpl, *words: Any, **named: Any) -> DictConfig:
        composed.append(named["overrides"])
        return load(self, *words, **named)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counted)
    seen: list[tuple[Any, ...]] = []

    def run(cfg: DictConfig) -> None:
        seen.append((cfg, OmegaConf.is_struct(cfg), command(), recipes(), replaced(), is_sweep()))

    words = ["lr=0.5", "method=mezo", "++task.num_dev=7", "seed=1"]
    assert launch(words, run) == 0
    assert len(composed) == 1
    assert launch([*words, "hydra.verbose=false"], run) == 0
    assert len(composed) > 2
    assert seen[0] == seen[1]
    typed = "smezo train lr=0.5 method=mezo ++task.num_dev=7 seed=1"
    assert seen[0][1:] == (True, typed, seen[0][3], [], False)
    assert seen[0][3] != []


def test_sweep_runs_every_combination_once() -> None:
    seen: list[tuple[str, int]] = []
    words = ["method=mezo,sparse_mezo", "-m", "seed=range(0,2)"]
    assert launch(words, lambda cfg: seen.append((cfg.method.name, cfg.seed))) == 0
    assert seen == [("mezo", 0), ("mezo", 1), ("sparse_mezo", 0), ("sparse_mezo", 1)]
    files = [str(path) for path in Path().rglob("*") if path.is_file()]
    assert files == ["runs/default/multirun.yaml"]


def test_each_job_of_a_sweep_over_models_has_its_own_recipe() -> None:
    seen: list[tuple[int, int, list[str]]] = []
    words = ["-m", "task=toy", "model=roberta-large,opt-13b,tiny-opt", "method=mezo"]
    assert launch(words, lambda cfg: seen.append((cfg.batch_size, cfg.steps, recipes()))) == 0
    assert seen == [
        (64, 100_000, ["shared/roberta-large-mezo"]),
        (16, 20_000, ["shared/opt-mezo"]),
        (16, 20_000, []),
    ]


def failing(cfg: DictConfig) -> None:
    if cfg.seed == 1:
        raise UserError("no room.")
    if cfg.seed == 2:
        raise RuntimeError("broken")
    if cfg.seed == 3:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["seed=0"], 0),
        (["seed=1"], 2),
        (["seed=2"], 1),
        (["seed=3"], 130),
        (["-m", "seed=0,1"], 2),
        (["-m", "seed=2,1,0"], 1),
        (["-m", "seed=1,2,0"], 1),
        (["-m", "seed=1,3"], 130),
    ],
    ids=lambda value: str(value),
)
def test_exit_code_is_the_worst_of_the_jobs(words: list[str], code: int) -> None:
    assert launch(words, failing) == code


def test_failed_job_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    ended = []

    def run(cfg: DictConfig) -> None:
        failing(cfg)
        ended.append(cfg.seed)

    assert launch(["-m", "seed=2,1,0"], run) == 1
    assert ended == [0]
    err = capsys.readouterr().err
    assert "RuntimeError: broken" in err
    assert "job 0 (seed=2): crashed" in err
    assert "smezo: job 1 (seed=1): no room." in err


def test_sweep_over_an_added_key() -> None:
    seen: list[bool] = []
    words = ["-m", "method=sgd", "+method.optimizer.nesterov=true,false"]
    assert launch(words, lambda cfg: seen.append(cfg.method.optimizer.nesterov)) == 0
    assert seen == [True, False]


def test_interrupt_ends_a_sweep() -> None:
    ended = []

    def run(cfg: DictConfig) -> None:
        ended.append(cfg.seed)
        failing(cfg)

    assert launch(["-m", "seed=3,0"], run) == 130
    assert ended == [3]


def test_job_knows_its_command_and_its_recipes(own: Path) -> None:
    seen: list[tuple[str, list[str]]] = []
    words = ["-m", "--config-dir", str(own), "task=mine", "method=mezo,adamw", "name='a b'"]
    assert launch(words[:-1], lambda cfg: seen.append((command(), recipes()))) == 0
    start = f"smezo train --config-dir {own} task=mine method="
    assert seen == [
        (f"{start}mezo", ["shared/small-mezo", f"mine-{MODEL}-mezo"]),
        (f"{start}adamw", ["shared/small-adamw"]),
    ]
    assert (command(), recipes()) == ("", [])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--cfg job", "seed: 0\n"),
        ("--cfg job --package method", "name: sparse_mezo"),
        ("--cfg job --resolve method=mezo lr=0.125", "lr: 0.125\n  eps: 0.001"),
        ("--help", "Groups (GROUP=CHOICE)"),
        ("--version", "Hydra 1.3"),
    ],
)
def test_hydra_flags_work_and_run_nothing(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(words.split(), lambda cfg: pytest.fail("ran")) == 0
    assert says in capsys.readouterr().out
    assert not os.listdir()


def test_help_names_groups_before_settings(capsys: pytest.CaptureFixture[str]) -> None:
    launch(["--help"], lambda cfg: None)
    out = capsys.readouterr().out
    places = [out.index(x) for x in ("smezo train -m", "method: adamezo, ", "seed: 0")]
    assert places == sorted(places)


# --- digest ----------------------------------------------------------------------------------


def test_digest_names_what_can_change_a_result() -> None:
    same = ["name=x", "runs_dir=y", "logger=wandb", "if_exists=fresh", "compile=false"]
    other = ["seed=1", "data_seed=1", "lr=0.5", "method=mezo", "task.num_dev=7", "dtype=bfloat16"]
    first = digest(compose())
    assert [digest(compose([word])) for word in same] == [first] * len(same)
    assert len({first, *(digest(compose([word])) for word in other)}) == len(other) + 1


def test_digest_is_of_values_not_of_spelling() -> None:
    assert digest(compose(["lr=1"])) == digest(compose(["lr=1.0"]))
    assert digest(compose(["eps=1e-3"])) == digest(compose(["eps=0.001"]))
    assert digest({"b": 1, "a": [2.0]}) == digest({"a": [2], "b": 1.0})


def test_keys_that_came_later_are_in_the_digest_where_they_are_set() -> None:
    """A run from before there were such keys keeps its name; set, they change results."""
    now = plain(compose())
    method = {
        key: value
        for key, value in now["method"].items()
        if key not in ("clip_projected_grad", "objective")
    }
    before = {k: v for k, v in now.items() if k not in ("stop_if_diverged", "patience")}
    first = digest(now)
    assert digest(before | {"method": method}) == first
    later = [
        digest(now | {"stop_if_diverged": 2.0}),
        digest(now | {"patience": 3}),
        digest(now | {"method": method | {"clip_projected_grad": 9.0}}),
        digest(now | {"method": method | {"objective": "accuracy"}}),
    ]
    assert len({first, *later}) == 5


def test_digest_stays_the_same_over_versions() -> None:
    """sha256 of {"a":{"0":"x"},"b":[0.001,null,true]}, computed by hand."""
    assert digest({"name": "n", "b": [1e-3, None, True], "a": {0: "x"}}) == "e98c6574"


# --- build -----------------------------------------------------------------------------------


class Thing:
    def __init__(self, model: str, *, lr: float, size: int = 1, inner: object = None) -> None:
        if lr < 0:
            raise ValueError("lr=-1: must be above 0")
        self.arguments = (model, lr, size, inner)


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> str:
    from smezo_cli.methods import mezo

    monkeypatch.setattr(mezo, "Thing", Thing, raising=False)
    monkeypatch.setattr(Thing, "__module__", mezo.__name__)  # as if it were written there
    return "smezo_cli.methods.mezo.Thing"


def test_build_calls_the_target_with_node_and_runtime(target: str) -> None:
    cfg = OmegaConf.create({"rate": 0.5, "method": {"_target_": target, "lr": "${rate}"}})
    cfg.method.name = "thing"
    assert build(cfg.method, model="m").arguments == ("m", 0.5, 1, None)


def test_build_offers_the_runtime_and_the_target_takes_its_share(target: str) -> None:
    node = {"_target_": target, "lr": 1}
    assert build(node, model="m", seed=3, size=2).arguments == ("m", 1, 2, None)
    with pytest.raises(UserError, match="method takes no size"):
        build({**node, "size": 5}, model="m", size=2)


def test_build_hands_on_a_nested_target_as_a_partial(target: str) -> None:
    node = {"_target_": target, "lr": 1, "inner": {"_target_": target, "lr": 2, "size": 3}}
    inner: Callable[..., Thing] = build(node, model="m").arguments[3]
    assert inner("n").arguments == ("n", 2, 3, None)


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"_target_": "os.system"}, ["method._target_=os.system is not allowed", "smezo_cli."]),
        ({}, ["method._target_=null is not allowed"]),
        ({"_target_": "smezo_cli.methods.nothing.X"}, ["methods.nothing.X is not there"]),
        ({"_target_": "smezo_cli.methods.mezo.MeZo"}, ["is not there", "MeZO"]),
        ({"_target_": "smezo_cli.methods.mezo"}, ["is a module"]),
        ({"lr": 1, "sise": 2}, ["method takes no sise", "did you mean size", "inner, lr, size"]),
        ({"size": 2}, ["method.lr is needed"]),
        ({"lr": -1}, ["method: lr=-1: must be above 0"]),
        ({"lr": 1, "inner": {"_target_": "os.system"}}, ["method.inner._target_=os.system"]),
    ],
)
def test_build_refuses(node: dict[str, object], says: list[str], target: str) -> None:
    if "_target_" not in node and node:
        node = {"_target_": target, **node}
    with pytest.raises(UserError) as error:
        build(node, model="m")
    for part in says:
        assert part in str(error.value)


# --- quotes that a shell has eaten -----------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{text} It was",
        '"{a}" is {b}?\\nA:',
        "it's {a} \\\" x",
        "{a}\\",
        "a,{b}",
        "{a} = {b|strip}",
        'say "x\\\\" {a}',
        "{{{a}}}",
    ],
)
def test_a_template_needs_no_second_pair_of_quotes(template: str) -> None:
    """In a shell, task.prompt="{text} It was" arrives without its quotes."""
    parsed = compose([quoted(f"task.prompt={template}"), "task=toy"])
    assert parsed.task.prompt == template
    prepare(["task=toy", f"task.prompt={template}"])


@pytest.mark.parametrize(
    "word", ["task.prompt='{a}'", 'task.prompt="{a}","{b}"', "task.prompt=1", "lr={a}", "~task"]
)
def test_other_words_stay_as_they_are(word: str) -> None:
    assert quoted(word) == word


def test_a_task_on_ones_own_data_is_named_by_its_file() -> None:
    for data, name in [
        ("my.csv", "my"),
        ("some where/Film reviews.v2.jsonl", "Film-reviews.v2"),
        ("stanfordnlp/imdb", "imdb"),
        ("...", "generation"),
    ]:
        words = ["task=generation", f"task.data={data}", "task.prompt='{a}'"]
        assert check(compose(words)).task["name"] == name
    assert check(compose([*words, "task.name=mine"])).task["name"] == "mine"


def test_a_command_has_fields_of_an_adapter_as_they_are_typed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without the signs by which Hydra adds what no YAML names; also where a job is named."""
    words = ["-m", "method=mezo_peft", "method.adapter.kind=lora", "method.adapter.config.r=2,4"]
    seen: list[str] = []

    def run(_: DictConfig) -> None:
        seen.append(command())
        raise UserError("said")

    launch(words, run)
    start = "smezo train method=mezo_peft method.adapter.kind=lora method.adapter.config.r="
    assert seen == [f"{start}2", f"{start}4"]
    assert "method.adapter.kind=lora method.adapter.config.r=4): said" in capsys.readouterr().err


def test_nothing_of_a_launch_is_left_for_a_later_run() -> None:
    """A run that a program starts by itself has no command line and no recipes."""
    seen: list[list[str]] = []
    assert launch([], lambda cfg: seen.append(recipes())) == 0
    assert seen[0] != []
    assert (recipes(), command()) == ([], "")

"""The `smezo` command as a person meets it: verbs, help, exit codes, and how fast it answers."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from smezo_cli import __version__
from smezo_cli.cli.ls import METHOD_GROUPS
from smezo_cli.cli.verbs import VERBS, main
from smezo_cli.config.fixed import CONF_DIR
from tests import ROOT


def python(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True
    )


def smezo(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "smezo_cli", *words, cwd=cwd)


def imports(*words: str, cwd: Path) -> tuple[int, set[str]]:
    """Exit code and the packages that were imported to answer."""
    script = (
        "import sys; from smezo_cli.cli.verbs import main; code = main(sys.argv[1:]); "
        "print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    run = python("-c", script, *words, cwd=cwd)
    return run.returncode, {name.partition(".")[0] for name in run.stderr.split()}


HEAVY = {"torch", "transformers", "datasets", "wandb", "numpy"}


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_help_names_the_verbs(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        assert f"smezo {verb} " in out


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_tells_its_usage(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"smezo {verb} " in capsys.readouterr().out


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code, modules = imports("--help", cwd=tmp_path)
    assert code == 0
    assert not modules & (HEAVY | {"hydra", "omegaconf"})


def test_torch_is_loaded_by_nothing_that_answers_without_it(tmp_path: Path) -> None:
    """Not by what mistakes, settings, files and tables need, whatever of it is imported."""
    script = """
import importlib, pkgutil, sys
for name in ("errors", "kinds", "words", "config", "files", "report", "cli.verbs"):
    module = importlib.import_module(f"smezo_cli.{name}")
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        importlib.import_module(f"{module.__name__}.{found.name}")
        assert not {"torch", "matplotlib"} & sys.modules.keys(), found.name
print("none")
"""
    run = python("-c", script, cwd=tmp_path)
    assert (run.stdout, run.stderr) == ("none\n", "")


@pytest.mark.parametrize(
    ("words", "code"),
    [(["stpes=3"], 2), (["-m", "seed=0,-1"], 2), (["--cfg", "job"], 0), (["--help"], 0)],
    ids=str,
)
def test_train_answers_without_torch(words: list[str], code: int, tmp_path: Path) -> None:
    got, modules = imports("train", *words, cwd=tmp_path)
    assert got == code
    assert not modules & HEAVY


def test_columns_of_own_data_are_checked_before_torch_is_loaded(tmp_path: Path) -> None:
    """And nothing is left of a run that could not begin."""
    (tmp_path / "a.csv").write_text("text,label\ngood,0\nbad,1\n")
    words = ["task=classification", "task.data=a.csv", "task.labels=[bad,good]"]
    code, modules = imports("train", *words, "task.prompt='{txt}. It was'", cwd=tmp_path)
    assert code == 2
    assert not modules & HEAVY
    assert not list((tmp_path / "runs").rglob("*.json"))


@pytest.mark.parametrize("verb", ["eval", "predict", "export"])
def test_a_folder_that_is_no_run_is_refused_before_torch_is_loaded(
    verb: str, tmp_path: Path
) -> None:
    more = {"eval": [], "predict": ["--field", "text=a"], "export": ["out"]}[verb]
    code, modules = imports(verb, "runs", *more, cwd=tmp_path)
    assert code == 2
    assert not modules & HEAVY


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--info defaults", "recipe/rotten_tomatoes-smollm2-135m-sparse_mezo"),
        ("--info steps=3", "steps: 3"),
        ("-m lr=1e-3,1e-4 --hydra-help", "Hydra"),
    ],
)
def test_hydra_tells_about_itself(words: str, says: str, tmp_path: Path) -> None:
    run = smezo("train", *words.split(), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert says in run.stdout
    assert not list(tmp_path.iterdir())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"smezo {__version__}\n"


def test_train_gets_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    stub = types.ModuleType("smezo_cli.train")
    stub.main = lambda argv: seen.append(argv) or 7  # type: ignore[attr-defined]  # a stub
    monkeypatch.setitem(sys.modules, "smezo_cli.train", stub)
    assert main(["train", "-m", "seed=0,1", "--cfg"]) == 7
    assert seen == [["-m", "seed=0,1", "--cfg"]]


@pytest.mark.parametrize("words", [[], *([g] for g in ("tasks", "model", "methods", "recipes"))])
def test_ls_names_every_file_with_its_first_sentence(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ls", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    groups = words or ["task", "model", "method", "recipe", "experiment", "table", "logger"]
    folders = [CONF_DIR / group.removesuffix("s") for group in groups]
    names = {
        file.relative_to(folder).with_suffix("").as_posix()
        for folder in folders
        for file in folder.rglob("*.yaml")
    }
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line[0] == " "}
    assert set(listed) == names
    assert all(sentence[-1] in ".?" and "@package" not in sentence for sentence in listed.values())


@pytest.mark.parametrize("group", ["task", "tasks"])
def test_show_prints_the_file(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", group, "rte"]) == 0
    assert capsys.readouterr().out == (CONF_DIR / "task" / "rte.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "lozo_m",
            ["#       N <- beta N + (1 - beta) projected_grad U", "2410.07698", "step: 2\n"],
        ),
        ("mezo_lora", ["#       theta <- theta - lr", "# State: 0 bytes"]),  # begins with mezo
        ("mezo_svrg", ["# Forwards a step: 2, 4, 2, 4", "2404.08080"]),
        ("adamw", []),  # of torch: its file says it all
    ],
)
def test_show_adds_formula_and_cost_of_a_method_as_comments(
    name: str, says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """So what is shown remains the file of a method."""
    assert main(["show", "method", name]) == 0
    shown = capsys.readouterr().out
    file = (CONF_DIR / "method" / f"{name}.yaml").read_text()
    assert shown.startswith(file)
    added = shown.removeprefix(file)
    assert all(line.startswith("#") for line in added.splitlines())
    assert all(word in added for word in says)
    assert yaml.safe_load(shown) == yaml.safe_load(file)


def test_methods_are_listed_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of ours is of a known kind; one that names none, or another, is listed last."""
    (tmp_path / "method").mkdir()
    (tmp_path / "method/mine.yaml").write_text("# Mine.\n# Group: nonsense\n")
    assert main(["ls", "methods", "--config-dir", str(tmp_path)]) == 0
    kinds: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if line[0] != " ":
            names = kinds[line.removeprefix("methods, ").rstrip(":")] = []
        else:
            names.append(line.split()[0])
    assert [title.split(":")[0] for title in kinds] == [*filter(None, METHOD_GROUPS), "of your own"]
    assert kinds["of your own"] == ["mine"]
    assert "lozo" in kinds["factored: matrices along products of thin ones"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("trian", "no verb trian, did you mean train?"),
        ("steps=3", "no verb steps=3 (there are: bench, choose, completion, doctor"),
        ("ls taks", "no group taks, did you mean tasks?"),
        ("ls tasks models", "one group at most"),
        ("show method", "a group and a name"),
        ("show method mzo", "no method mzo, did you mean m"),
        ("show methode mezo", "no group methode, did you mean methods?"),
    ],
)
def test_mistake_is_one_sentence_and_exit_code_2(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("word", ["x", "method.nothing", "eval_every", "a["])
@pytest.mark.parametrize("shown", ["job", "hydra"])
def test_a_package_that_is_not_there_is_one_sentence(
    word: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "task=toy", "model=tiny-llama", "--cfg", shown, "--package", word]) == 2
    said = capsys.readouterr().err
    assert said.startswith("smezo: ")
    assert said.count("\n") == 1


def test_a_zero_byte_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "runs/a", "b\0"]) == 2
    assert "holds a zero byte" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", os.fsdecode(b"runs_dir=caf\xe9")]) == 2
    said = capsys.readouterr().err
    assert "runs_dir=caf\\udce9: it is not UTF-8" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code"),
    [("train", 2), ("eval x", 2), ("ls", 0), ("train --help", 0), ("runs --runs-dir .", 0)],
)
def test_docstrings_that_are_dropped_are_asked_for_before_a_model_is(
    words: str, code: int, tmp_path: Path
) -> None:
    """What transformers says of them takes two lines and names neither Python nor the way out."""
    run = python("-OO", "-m", "smezo_cli", *words.split(), cwd=tmp_path)
    assert run.returncode == code
    assert run.stderr.count("\n") == (code == 2)
    assert ("unset PYTHONOPTIMIZE" in run.stderr) is (code == 2)


def test_damaged_lines_are_found_without_assertions_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": "1"}\n{"step": 1, "projected_grad": 1}\n[]\n')
    script = (
        "import pathlib; from smezo_cli.report.curves import read_metrics; "
        "from smezo_cli.report.runs import Run; print(read_metrics(Run(pathlib.Path('.'), {}, {})))"
    )
    run = python("-O", "-c", script, cwd=tmp_path)
    assert (run.stdout, run.stderr) == ("({}, {}, 3)\n", "")

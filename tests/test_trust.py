"""Nothing in smezo executes what it reads, and no secret is written down."""

import ast
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from smezo_cli.cli.verbs import main
from smezo_cli.config.build import target_of
from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError, redacted, redacted_tree
from smezo_cli.files import bounded
from smezo_cli.models.load import load_model
from tests import ROOT

SOURCES = sorted((ROOT / "smezo_cli").rglob("*.py"))
TOY = ["task=toy", "model=tiny-llama", "device=cpu", "steps=1", "batch_size=2", "compile=false"]
SMALL = [*TOY, "task.num_train=4", "task.num_dev=2", "task.num_test=2"]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


# --- nothing is executed ---------------------------------------------------------------------

_NEVER = {"eval", "exec", "compile", "__import__", "breakpoint"}
_NEVER_OF = {
    *("os.system", "os.popen", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load"),
    *("pkgutil.resolve_name", "numpy.load", "np.load", "joblib.load", "shutil.unpack_archive"),
}
_NO_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "code", "runpy"}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_no_source_file_executes_or_unpickles(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        where = f"{file.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not {name.split(".")[0] for name in names} & _NO_MODULES, where
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in _NEVER | _NEVER_OF, f"{where}: {name}"
            for keyword in node.keywords:
                given = ast.unparse(keyword.value)
                assert keyword.arg != "shell" or given == "False", where
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                    # False, or the user's own flag.
                    assert ast.unparse(value) == "False" or "trust_remote_code" in ast.unparse(
                        value
                    )


@pytest.mark.parametrize(
    "name",
    [
        *(
            "os.system",
            "builtins.eval",
            "smezo_cli.files.atomic.write_text",
            "smezo_cli.zo.optimizer.ZerothOrder",
        ),
        *("smezo_cli.methods.first_order.torch.load", "smezo_cli.methods.first_order.stream_key"),
        *("smezo_cli.methods.first_order.NonFiniteLoss", "smezo_cli.methods.mezo.__builtins__"),
        *("torch.optim.lr_scheduler.os.system", "torch.optim.lr_scheduler.LambdaLR"),
        *("torch.optim.swa_utils.copy.deepcopy", "torch.optim.sys", "torch.optim._functional.adam"),
        *("torch.optim.Adam.step", "torch.optim.adam.torch", "torch.load", "my_package.Method"),
        *("smezo_cli.methods", "smezo_cli.methods.mezo", "torch.optim.adam.adam", "", None, 1),
    ],
)
def test_no_target_but_a_method_or_an_optimizer(name: Any) -> None:
    with pytest.raises(UserError, match="_target_"):
        target_of({"_target_": name}, "method")


@pytest.mark.parametrize(
    "name", ["torch.optim.AdamW", "torch.optim.adamw.AdamW", "smezo_cli.methods.mezo.MeZO"]
)
def test_methods_and_optimizers_are_found(name: str) -> None:
    assert target_of({"_target_": name}, "method").__name__ == name.rpartition(".")[2]


@pytest.mark.parametrize(
    "word",
    [
        *("hydra.launcher._target_=os.system", "hydra.sweeper._target_=builtins.exec"),
        "hydra.launcher._target_=hydra._internal.core_plugins.basic_launcher.Path",
        *("+hydra.callbacks.x._target_=os.getcwd", "hydra.run.dir=elsewhere"),
        *("hydra.output_subdir=x", "hydra.job.chdir=true", "+hydra.job.env_set.PYTHONPATH=x"),
        "+hydra.job_logging.handlers={x: {class: logging.FileHandler, filename: x}}",
        "+hydra.hydra_logging.formatters={x: {'()': os.system}}",
        "+hydra.job_logging.y=ext://os.environ",
        *("method._target_=os.system", "task.name=../../x", "model.name=/x", "method.name=a/b"),
    ],
)
def test_the_line_cannot_name_other_code_or_folders(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert word.lstrip("+").partition("=")[0].split(".")[1] in refused([*SMALL, word], capsys)
    assert not list(tmp_path.iterdir())


def test_a_model_with_code_is_refused_naming_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}'
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    words = ["task=toy", "model=own", "model.path=./m", "device=cpu", "steps=1"]
    said = refused(words, capsys)
    assert "model.trust_remote_code=true" in said
    assert "with all your rights" in said
    assert not (tmp_path / "ran").exists()
    assert "trust_remote_code" in refused([*words, "model.trust_remote_code=yes"], capsys)


def test_files_beside_a_known_architecture_are_not_executed_and_a_line_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    """As docs/explain/security.md has it: transformers' own class computes the model."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "m"
    save_tiny(folder)
    about = json.loads((folder / "config.json").read_text())
    about["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(about))
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens["auto_map"] = {"AutoTokenizer": ["own.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    words = [*SMALL[:1], *SMALL[2:], "model=own", "model.path=./m", "model.max_length=256"]
    capsys.readouterr()
    assert main(["train", *words, "lr=1e-4", "eps=1e-2"]) == 0
    said = capsys.readouterr().out
    assert "the Python files that the model brings are not executed; transformers' own " in said
    assert not (tmp_path / "ran").exists()
    (file,) = tmp_path.rglob("result.json")
    assert json.loads(file.read_text())["trust_remote_code"] is False


def save_tiny(folder: Path) -> None:
    node = check(compose(TOY)).model
    cpu = torch.device("cpu")
    model, tokenizer = load_model(node, dtype=torch.float32, device=cpu, cache=folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_the_commit_of_a_hub_model_is_in_its_result(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    """From the hub's cache, as an earlier download left it, with no network."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--who--what"
    save_tiny(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = [*SMALL[:1], *SMALL[2:], "model=own", "model.path=who/what"]
    words += ["model.max_length=256", "lr=1e-4", "eps=1e-2"]
    assert main(["train", *words]) == 0
    (file,) = tmp_path.rglob("result.json")
    assert json.loads(file.read_text())["model_commit"] == commit
    capsys.readouterr()
    assert main(["runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["model_commit"] == commit


def test_a_model_with_code_runs_where_it_is_allowed_and_every_verb_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "m"
    save_tiny(folder)
    capsys.readouterr()  # a bar
    about = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    about |= {"model_type": "own-llama", "architectures": ["OwnModel"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    words = [*SMALL[:1], *SMALL[2:], "model=own", "model.path=./m"]
    words += ["model.max_length=256", "lr=1e-4", "eps=1e-2"]
    assert "add model.trust_remote_code=true" in refused(words, capsys)
    assert not (tmp_path / "ran").exists()
    assert main(["train", *words, "model.trust_remote_code=true"]) == 0
    assert "  remote code  Python files of the model are executed" in capsys.readouterr().out
    assert (tmp_path / "ran").exists()
    results = {f.parent: json.loads(f.read_text()) for f in tmp_path.rglob("result.json")}
    (run,) = (path for path, result in results.items() if result["status"] == "done")
    assert results[run]["trust_remote_code"] is True
    for verb in (
        ["eval", str(run)],
        ["predict", str(run), "--field", "text=fine"],
        ["replay", str(run)],
    ):
        assert main(verb) == 0
        said = capsys.readouterr()
        lines = [line for line in (said.out + said.err).splitlines() if "remote code" in line]
        assert len(lines) == 1, verb
        assert "Python files of ./m are executed" in lines[0]
    assert main(["export", str(run), "x.delta", "--delta"]) == 0
    capsys.readouterr()
    assert main(["replay", "x.delta"]) == 2
    assert "would run with all your rights" in capsys.readouterr().err


# --- secrets ---------------------------------------------------------------------------------

TOKENS = {
    "HF_TOKEN": "hf_planted0123456789abcdefghij",
    "WANDB_API_KEY": "planted-key-0123456789",
    "MY_SECRET": "planted secret: with {blanks} and 'quotes' \"two\"",
    "DB_PASSWORD": "planted+pass/word",
}
LOGIN = "https://user:planted-pw@example.org/model"


@pytest.mark.parametrize("logger", ["jsonl", "tensorboard", "wandb"])
def test_no_secret_reaches_the_run_folder(
    logger: str,
    tmp_path: Path,
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if logger != "jsonl":
        pytest.importorskip(logger)
    monkeypatch.chdir(tmp_path)
    for name, value in TOKENS.items():
        monkeypatch.setenv(name, value)
    planted = [
        "++model.bos_token=null",
        f"logger={logger}",
        f"++model.revision='${{oc.env:DB_PASSWORD}}{LOGIN}'",
        f"runs_dir='{tmp_path}/runs'",
    ]
    if logger == "wandb":
        planted.append("logger.tags=['${oc.env:WANDB_API_KEY}']")
    code = main(["train", "-m", *SMALL, *planted, "seed=0,1"])
    out = capfd.readouterr()
    assert code == 0, out.err[-2000:]
    said = out.out + out.err
    written = [f for f in (tmp_path / "runs").rglob("*") if f.is_file()]
    assert any(f.name == "multirun.yaml" for f in written)
    assert any(f.name == "result.json" for f in written)
    for secret in (*TOKENS.values(), "planted-pw"):
        assert secret not in said
        for file in written:
            if not file.name.startswith(("predictions-", ".lock")):
                assert secret.encode() not in file.read_bytes(), file


def test_errors_are_redacted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-token")
    said = refused(["task=toy", "model=own", f"model.path={LOGIN}", "steps=1"], capsys)
    assert "planted" not in said
    assert "https://[login]@example.org" in said
    assert "planted" not in refused([*SMALL, "keep=${oc.env:HF_TOKEN}"], capsys)


def test_a_prompt_with_a_secret_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A redacted prompt would be another one."""
    monkeypatch.setenv("DB_PASSWORD", "planted-password")
    words = ["task.prompt='{text} ${oc.env:DB_PASSWORD}'", "task.labels=[bad,good]"]
    said = refused([*SMALL, *words], capsys)
    assert "task.prompt holds a secret" in said
    assert "planted" not in said


@pytest.mark.parametrize(
    "word", ["name=planted-x", "runs_dir=planted-x", "task.name=planted-x", "model.name=planted-x"]
)
def test_a_path_with_a_secret_is_refused(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Printed as [HF_TOKEN]-x it is no path, and printed as it is it gives the secret away."""
    monkeypatch.setenv("HF_TOKEN", "planted")
    said = refused([*SMALL, word], capsys)
    assert f"{word.replace('planted', '[HF_TOKEN]')} holds a secret" in said
    assert "planted" not in said


def test_what_is_no_secret_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TOKENIZERS_PARALLELISM": "false", "A_TOKEN": "", "B_TOKEN": "1"}.items():
        monkeypatch.setenv(name, value)
    text = "model.path=https://example.org/a@b 1 false a@b.c step 11"
    assert redacted(text) == text
    assert redacted_tree({"a": [1, None, "x"], "b": (True,)}) == {"a": [1, None, "x"], "b": [True]}


def test_a_message_is_one_line_without_controls() -> None:
    assert str(UserError("a\nb\x1b[31m\u202e\ud800 é")) == "a b\\x1b[31m\\u202e\\ud800 é"
    assert len(str(UserError("x" * 10**6))) < 5000


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 10)}]\n"
    for below, name in zip("abcde", "bcdef", strict=True)
)


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "unpacks to more"),
        ("a: &a [*a]", "names nothing"),
        ("a: " + "[" * 99 + "]" * 99, "nests deeper"),
        ("a: '" + "x" * 200_000 + "'", "bytes"),
        ("- a", "holds a list"),
        ("7", "its settings are no mapping"),
        ("a: !!python/object/apply:os.getcwd []", "cannot be read"),
    ],
    ids=["bomb", "cycle", "deep", "long", "list", "number", "object"],
)  # fmt: skip
def test_settings_that_are_none(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        bounded.load_yaml(tmp_path / "x.yaml")


def test_references_that_grow_are_refused() -> None:
    tree = {f"a{i}": f"${{a{i + 1}}}${{a{i + 1}}}" for i in range(40)} | {"a40": "x"}
    with pytest.raises(UserError, match="unpacks to more"):
        bounded.check_expansion(tree)
    with pytest.raises(UserError, match="refers to itself"):
        bounded.check_expansion({"a": "${b}", "b": {"c": "${a}"}})
    bounded.check_expansion({"a": "${b} see a or ${oc.env:HOME,a}", "b": "x"})
    ours = yaml.safe_load((ROOT / "conf" / "train.yaml").read_text(encoding="utf-8"))
    bounded.check_expansion(ours)


def test_a_link_in_a_run_folder_leads_nowhere(tmp_path: Path) -> None:
    from smezo_cli.files.atomic import write_text
    from smezo_cli.store.folder import RunFolder

    kept = tmp_path / "kept.txt"
    kept.write_text("keep")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(kept)
    with pytest.raises(UserError, match="cannot write"):
        RunFolder(run)
    (run / ".result.json.partial").symlink_to(kept)
    write_text(run / "result.json", "new")
    assert kept.read_text() == "keep"
    assert (run / "result.json").read_text() == "new"
    (run / ".lock").unlink()
    (run / "checkpoint").rmdir()
    (run / "checkpoint").symlink_to(tmp_path)
    with pytest.raises(UserError, match="link to elsewhere"):
        RunFolder(run)


def test_a_pipe_is_no_file_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(UserError, match="no ordinary file"):
        bounded.check_ordinary(tmp_path / "x")
    assert bounded.read_json(tmp_path / "x") is None

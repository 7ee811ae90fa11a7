"""TAB offers what may end the line, and nothing heavy is imported for it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smezo_cli.cli.flags import Flags
from smezo_cli.cli.verbs import VERBS, main
from smezo_cli.errors import UserError
from tests import ROOT


def offers(line: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["completion", "query", line]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("smezo tr", ["train "]),
        ("smezo e", ["eval ", "export "]),
        ("smezo train task=rot", ["task=rotten_tomatoes"]),
        ("smezo train -m seed=0,1 model=tiny-ll", ["model=tiny-llama"]),
        ("smezo train method.mask_re", ["method.mask_refresh_every=", "method.mask_resample="]),
        ("smezo train method=adamw method.optimizer.w", ["method.optimizer.weight_decay="]),
        ("smezo train --mul", ["--multirun "]),
        ("smezo eval --ba", ["--base "]),
        ("smezo bench --ro", ["--rounds "]),
        ("smezo bench length=32 model=tiny-ll", ["model=tiny-llama"]),
        ("smezo bench l", ["length="]),
        ("smezo bench st", []),
        ("smezo plot sp", ["sparsity "]),
        ("smezo plot sparsity sm", ["small/1 "]),
        ("smezo plot curve --o", ["--out "]),
        ("smezo report sm", ["small/1 "]),
        ("smezo report --o", ["--out "]),
        ("smezo show meth", ["methods "]),
        ("smezo show methods sp", ["sparse_mezo", "sparse_mezo_lora"]),
        ("smezo show table are", ["arena/1", "arena/2"]),
        ("smezo nothing ", []),
    ],
)
def test_the_last_word_is_completed(
    line: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert offers(line, capsys) == expected


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("train", "completion")])
def test_tab_offers_the_flags_that_a_verb_takes(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = {"--help"}

    def note(flags: Flags, words: list[str]) -> None:
        taken.update(word for word in flags._option_string_actions if word.startswith("--"))
        raise UserError("these are all")

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(Flags, name, note)
    assert main([verb]) == 2
    assert set(offers(f"smezo {verb} --", capsys)) == {f"{flag} " for flag in taken}


def test_a_blank_offers_groups_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"task=", "method=", "steps=", "model="} <= set(offers("smezo train ", capsys))


def test_runs_are_offered_where_a_run_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "default" / "toy-s0").mkdir(parents=True)
    (tmp_path / "runs" / "default" / "toy-s0" / "result.json").touch()
    monkeypatch.chdir(tmp_path)
    assert offers("smezo export runs/", capsys) == ["runs/default/toy-s0"]


def test_bash_completes_what_stands_behind_an_equals_sign(tmp_path: Path) -> None:
    """Its words end at =, so the offer must not repeat what stands before."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    (tmp_path / "smezo").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m smezo_cli "$@"\n')
    (tmp_path / "smezo").chmod(0o755)
    script = """
        eval "$(smezo completion bash)"
        COMP_LINE="smezo train task=rot"; COMP_POINT=${#COMP_LINE}; _smezo_complete
        echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        [bash, "-c", script],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("rotten_tomatoes\n", "")


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bsh"]) == 2
    assert "did you mean bash" in capsys.readouterr().err

"""Files of the user that have the name of one of smezo's: they win, and it is said."""

import os
import shlex
from pathlib import Path

import pytest
from omegaconf import DictConfig

from smezo_cli.cli.verbs import main
from smezo_cli.config import searchpath
from smezo_cli.config.compose import compose
from smezo_cli.config.describe import command, replaced
from smezo_cli.config.digest import digest
from smezo_cli.config.fixed import CONF_DIR
from smezo_cli.config.launch import launch

TOY = ["task=toy", "model=tiny-llama", "method=mezo"]


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a MeZO of its own, its name as hard for Hydra's parser as names get."""
    monkeypatch.chdir(tmp_path)
    return changed(tmp_path / "mi ne's ä", "method/mezo", "\nlr: 1e-6", "\nlr: 0.5")


def changed(folder: Path, name: str, old: str, new: str) -> Path:
    text = (CONF_DIR / f"{name}.yaml").read_text(encoding="utf-8")
    assert old in text
    file = folder / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text.replace(old, new), encoding="utf-8")
    return folder


def jobs(*words: str) -> list[tuple[float, int, list[str], str]]:
    """What each job got: lr, steps, whose files were read, its command."""
    seen: list[tuple[float, int, list[str], str]] = []

    def run(cfg: DictConfig) -> None:
        seen.append((cfg.lr, cfg.steps, replaced(), command()))

    assert launch([*TOY, *words], run) == 0
    return seen


def instead(name: str, folder: Path) -> str:
    return f"{name}.yaml is that of {folder}, in place of smezo's own"


def test_a_file_of_config_dir_wins_and_is_named(mine: Path) -> None:
    ((lr, _, lines, words),) = jobs("--config-dir", str(mine))
    assert (lr, lines) == (0.5, [instead("method/mezo", mine)])
    assert shlex.split(words)[2:4] == ["--config-dir", str(mine)]
    ((lr, _, lines, words),) = jobs()
    assert (lr, lines, "--config-dir" in words) == (1e-6, [], False)


def test_a_file_of_hydra_searchpath_wins_and_stays_in_the_command(mine: Path) -> None:
    other = changed(Path("two").resolve(), "model/tiny-llama", "max_length: 256", "max_length: 99")
    word = f"hydra.searchpath=[two,{searchpath._quoted(mine.name)}]"
    ((lr, _, lines, words),) = jobs(word)
    assert lr == 0.5
    assert lines == [instead("model/tiny-llama", other), instead("method/mezo", mine)] or (
        lines == [instead("method/mezo", mine), instead("model/tiny-llama", other)]
    )
    assert f"--config-dir {other} " in words
    assert "hydra.searchpath=[" in words


def test_of_two_folders_the_first_wins_and_the_other_is_named(mine: Path) -> None:
    two = changed(Path("two").resolve(), "method/mezo", "\nlr: 1e-6", "\nlr: 0.25")
    ((lr, _, lines, _),) = jobs("--config-dir", "two", f"hydra.searchpath=['{_plain(mine)}']")
    assert lr == 0.25
    assert f"{_plain(mine)}/method/mezo.yaml is not read: that of {two} comes first" in lines


def _plain(folder: Path) -> Path:
    """The same folder, under a name that needs no care."""
    link = folder.parent / "plain"
    if not link.exists():
        link.symlink_to(folder)
    return link


def test_what_hydra_reads_first_is_named(mine: Path) -> None:
    (mine / "hydra" / "job_logging").mkdir(parents=True)
    (mine / "hydra" / "job_logging" / "none.yaml").write_text("version: 1\n")
    (mine / "method" / "mezo.yaml").unlink()
    ((_, _, lines, _),) = jobs("--config-dir", str(mine))
    file = mine / "hydra" / "job_logging" / "none.yaml"
    assert lines == [f"{file} is not read: Hydra's own comes first"]


def test_every_job_of_a_sweep_reads_it(mine: Path) -> None:
    found = jobs("--config-dir", str(mine), "-m", "seed=0,1")
    assert [(lr, lines) for lr, _, lines, _ in found] == [(0.5, [instead("method/mezo", mine)])] * 2


def test_a_whole_train_yaml_replaces_ours(mine: Path) -> None:
    changed(mine, "train", "\nsteps: 20000", "\nsteps: 3")
    ((_, steps, lines, _),) = jobs("--config-dir", str(mine))
    assert steps == 3
    assert instead("train", mine) in lines


@pytest.mark.parametrize("text", ["steps: 3\n", "defaults: [_self_]\nsteps: 3\n"])
def test_a_part_of_a_train_yaml_is_one_sentence(
    text: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "train.yaml").write_text(text)
    for words in (TOY, []):
        assert launch([*words, "--config-dir", str(mine)], lambda cfg: pytest.fail("ran")) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"{mine}/train.yaml is read in place of smezo's own train.yaml" in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hydra:\n  searchpath: [two]\n", "hydra.searchpath is set on the command line alone"),
        ("a: *b\n", "*b names nothing"),
    ],
)
def test_a_train_yaml_is_checked_before_hydra_reads_it(
    text: str, says: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "train.yaml").write_text(text)
    assert launch(["--config-dir", str(mine)], lambda cfg: pytest.fail("ran")) == 2
    assert says in capsys.readouterr().err


def test_help_names_groups_of_settings_alone(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "docs").mkdir()
    assert launch(["--help", "--config-dir", str(mine)], lambda cfg: pytest.fail("ran")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("method: ") for line in lines)
    assert not any(line.startswith("docs:") for line in lines)


def test_files_beside_the_groups_are_none_of_ours(mine: Path) -> None:
    (mine / "compose.yaml").write_text("a: *b\n")
    assert len(jobs("--config-dir", str(mine))) == 1


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("hydra.searchpath=[nowhere]", "hydra.searchpath nowhere: there is no such folder"),
        ("hydra.searchpath=[pkg://no.where]", "there is no such package"),
        ("hydra.searchpath=[structured://x]", "a folder or pkg://MODULE"),
        ("hydra.searchpath=[1]", "must be a list of folders"),
        ("hydra.searchpath=[", "cannot read"),
    ],
)
def test_a_search_path_that_cannot_be_is_one_sentence(
    word: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch([*TOY, word], lambda cfg: pytest.fail("ran")) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_what_runs_nothing_says_it_beside_its_output(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TOY, "--config-dir", str(mine)]
    assert launch([*words, "--cfg", "job", "--package", "lr"], lambda cfg: None) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("0.5\n", f"smezo: {instead('method/mezo', mine)}\n")
    assert main(["plan", *words]) == 0
    assert capsys.readouterr().err == f"smezo: {instead('method/mezo', mine)}\n"


def test_ls_show_and_completion_know_the_folder(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "method" / "mezo_mine.yaml").write_text("# Mine.\nlr: 1\n")
    flag = ["--config-dir", str(mine)]
    assert main(["show", *flag, "method", "mezo"]) == 0
    assert "\nlr: 0.5" in capsys.readouterr().out
    assert main(["ls", f"--config-dir={mine}", "methods"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in listed if "mezo_mine" in line] == [["mezo_mine", "Mine."]]
    assert sum(line.split()[0] == "mezo" for line in listed) == 1
    line = f"--config-dir {_plain(mine)}"
    for query in (f"smezo train {line} method=mezo_mi", f"smezo show {line} method mezo_mi"):
        assert main(["completion", "query", query]) == 0
        assert capsys.readouterr().out.split("=")[-1] == "mezo_mine\n"
    assert main(["ls", "--config-dir"]) == 2
    assert main(["show", "--config-dir", "nowhere", "method", "mezo"]) == 2


def test_a_file_with_the_same_values_is_the_same_run(mine: Path) -> None:
    (mine / "method" / "mezo.yaml").write_text((CONF_DIR / "method" / "mezo.yaml").read_text())
    assert digest(compose(TOY, str(mine))) == digest(compose(TOY))


def test_nothing_of_a_folder_is_left_for_a_later_command(mine: Path) -> None:
    assert compose(TOY, str(mine)).lr == 0.5
    assert compose(TOY).lr == 1e-6
    assert not os.path.exists("runs")

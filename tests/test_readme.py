"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.methods.test_every_method import ZEROTH_ORDER

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_library_example_learns_something(capsys: pytest.CaptureFixture[str]) -> None:
    """It runs, and its loss ends below where an untrained model stands."""
    _run(BLOCKS[0])
    loss, projected_grad, share = re.match(
        r"([\d.]+) \((-?[\d.e-]+),\) ([\d.]+)", capsys.readouterr().out
    ).groups()
    assert float(loss) < 0.65 < 0.693  # ln 2
    assert float(projected_grad) != 0
    assert 0.2 < float(share) <= 0.51  # a ratchet: weights leave the mask and do not return


# A Trainer pins memory unless told not to, and torch says that there is nothing to pin it for.
@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")
def test_the_trainer_example_makes_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _run(BLOCKS[1])
    assert "'train_loss': '4." in capsys.readouterr().out  # about ln 99
    assert (tmp_path / "out/checkpoint-3/optimizer.pt").is_file()


def _run(block: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_the_readme_fits_two_screens() -> None:
    """What is longer stands in docs/."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(BLOCKS) == 2
    assert len(lines) <= 140
    assert max(len(line) for line in lines if line[:1] != "|") <= 140


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
    broken = [x for x in links if "://" not in x and not (page.parent / x).exists()]
    assert not broken


def test_every_page_that_settings_and_messages_name_is_there() -> None:
    """Comments of YAML, the text of --help, errors and docstrings."""
    files = [file for top in ("conf", "smezo_cli") for file in (ROOT / top).rglob("*.*")]
    named = [
        (file, page)
        for file in files
        if file.suffix in (".py", ".yaml", ".html", ".json")
        for page in re.findall(r"(?<!ggml's )\bdocs/[\w./-]+\.md", file.read_text(encoding="utf-8"))
    ]
    assert len(named) > 20
    assert [(str(file), page) for file, page in named if not (ROOT / page).is_file()] == []


def test_every_page_of_the_docs_is_reached_from_the_readme() -> None:
    reached, new = set(), {ROOT / "README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)", page.read_text(encoding="utf-8"))
        here = {(page.parent / x).resolve() for x in links if "://" not in x}
        new |= here - reached
    assert set(PAGES) <= reached


def test_the_page_on_choosing_places_every_zeroth_order_method() -> None:
    """Each has a memory; no name stands there that is no method."""
    text = (ROOT / "docs/guide/choose.md").read_text(encoding="utf-8")
    memory = text[text.index("## How much memory") : text.index("## How many forwards")]
    placed = re.findall(r"`(\w+)`", re.sub(r"`method\.\w+`", "", memory))
    assert sorted(placed) == sorted(ZEROTH_ORDER)
    named = set(re.findall(r"`([a-z]\w+)`", text))
    assert named - {"query_ranks", "project_every", "f1"} <= set(placed)

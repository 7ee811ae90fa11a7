"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest

from tests import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_of_the_readme_learns_something(
    block: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library example runs, and its loss ends below where an untrained model stands."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    loss, projected_grad, share = re.match(
        r"([\d.]+) \((-?[\d.e-]+),\) ([\d.]+)", capsys.readouterr().out
    ).groups()
    assert float(loss) < 0.65 < 0.693  # ln 2
    assert float(projected_grad) != 0
    assert 0.2 < float(share) <= 0.51  # a ratchet: weights leave the mask and do not return


def test_the_readme_fits_two_screens() -> None:
    """What is longer stands in docs/."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert BLOCKS
    assert len(lines) <= 140
    assert max(len(line) for line in lines if line[:1] != "|") <= 140


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
    broken = [x for x in links if "://" not in x and not (page.parent / x).exists()]
    assert not broken


def test_every_page_of_the_docs_is_reached_from_the_readme() -> None:
    reached, new = set(), {ROOT / "README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)", page.read_text(encoding="utf-8"))
        here = {(page.parent / x).resolve() for x in links if "://" not in x}
        new |= here - reached
    assert set(PAGES) <= reached

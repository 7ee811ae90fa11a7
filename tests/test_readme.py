"""What the README shows runs as it stands there."""

import re

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


def test_the_readme_names_every_method_and_task() -> None:
    """Nothing that a user can choose is missing from `smezo ls`, which the README points to."""
    assert BLOCKS
    assert "smezo ls" in (ROOT / "README.md").read_text()

"""What tests of methods share."""

import pytest

from smezo_cli.zo import noise
from tests.quick_noise import remembering

_quick = remembering(noise.pair)


@pytest.fixture(autouse=True)
def _small_draws_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "pair", _quick)

"""`smezo plan`: what it says of a method is what that method does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from smezo_cli.config.build import build
from smezo_cli.config.compose import compose
from smezo_cli.config.settings import Settings, check
from smezo_cli.models.load import load_model
from smezo_cli.plan.planner import Plan, plan

TINY = ("task=toy", "model=tiny-llama", "steps=20", "eval_every=10", "compile=false")
WEIGHTS = 37_472  # of tiny-llama, its tied embedding once


def settings_of(*words: str) -> Settings:
    return check(compose([*TINY, *words, "device=cpu"]))


def planned(*words: str, tokens: int = 32) -> Plan:
    return plan(settings_of(*words), capacity=10**9, tokens=tokens)


def tiny_model(settings: Settings) -> Any:
    model, _ = load_model(
        settings.model, dtype=torch.float32, device=torch.device("cpu"), cache=Path("unused")
    )
    return model


# --- noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["mezo", "zo_conservative", "zo_block", "pezo", "lozo", "subzero", "elasticzo"]
)
def test_noise_that_is_kept_is_that_of_a_real_step(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(f"method={method}")
    model = tiny_model(settings)
    real = build(settings.method, "method", model=model, seed=0, backend="eager", check=False)
    dense = getattr(real.direction, "dense", real.direction)
    end, found = dense.end, []

    def ends() -> None:
        found.append(sum(z.nbytes + mask.nbytes for z, mask in dense._kept.values()))
        end()

    monkeypatch.setattr(dense, "end", ends)
    real.step(lambda: model(torch.ones(1, 4, dtype=torch.int64)).logits.square().mean())
    without = planned(f"method={method}", "method.keep_noise=false").phases["step"]
    assert planned(f"method={method}").phases["step"] - without == max(found) > 0


def test_looked_up_numbers_are_kept_and_need_no_compiler() -> None:
    found = planned("method=pezo", "compile=true")
    assert "Numba" not in found.resident
    assert found.phases["step"] == planned("method=pezo").phases["step"]


def test_noise_that_a_user_asks_for_is_kept_by_compiled_passes() -> None:
    auto, kept = (
        planned("method=mezo", "compile=true", f"method.keep_noise={wish}").phases["step"]
        for wish in ("auto", "true")
    )
    assert kept - auto == 5 * WEIGHTS

"""Runs that train some blocks alone: by number, or the dominant one, which is found once."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from smezo_cli.cli.verbs import main
from smezo_cli.config.compose import compose
from smezo_cli.config.digest import digest
from smezo_cli.config.fixed import plain
from smezo_cli.store.schema import is_sound_result
from smezo_cli.zo import outliers
from tests.run.rank_groups import SHORT_RUN, few_tokens, together
from tests.run.tiny_runs import METHODS, SEQUENTIAL, SMALL, result_of, run_folder, state_of

RUN = [*SMALL, "model=tiny-llama", "steps=3", "eval_every=2", "batch_size=4", "task.prompt=0"]
RUN += ["zero_shot=false", "lr_schedule=constant", "lr=1e-3"]
MEZO = ["method=mezo", SEQUENTIAL]
DOMINANT = "method.layers=dominant"
BLOCK_1 = "model.layers.1."


def found_in_block_1() -> None:
    """A random model has no outliers: let its second block have one."""

    def ratios(model: nn.Module, losses: Sequence[Any]) -> Mapping[int, float]:
        for loss in losses:
            assert float(loss().detach()) > 0  # rows of the task, which the model can compute
        return {0: 3.0, 1: 2000.0}

    outliers.ratios = ratios


def never_looked_for() -> None:
    def ratios(model: nn.Module, losses: Sequence[Any]) -> Mapping[int, float]:
        raise AssertionError("the layer is noted")

    outliers.ratios = ratios


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outliers, "ratios", outliers.ratios)


def ran(words: Sequence[str], cwd: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """The folder of a run, made or gone on with in this process, and what it said."""
    cwd.mkdir(exist_ok=True)
    monkeypatch.chdir(cwd)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["train", *words]) == 0
    return run_folder(cwd), said.getvalue()


def told(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_the_dominant_layer_is_found_once_and_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is that of its number; who goes on with it, or replays it, never looks again."""
    found_in_block_1()
    words = [*RUN, *MEZO, DOMINANT, "keep_inputs=auto"]
    folder, said = ran(words, tmp_path / "found", monkeypatch)
    line = "block 1 of 2 alone: the first whose output has an entry above 1000 times its median"
    assert f"  layers  {line} (2e+03 times)" in said
    assert f"  layers    {line} (2e+03 times)" in said  # among the lines that close the run
    assert "what enters block 1 of 2, once a row" in said
    noted = {"block": 1, "num_blocks": 2, "ratio": 2000.0, "factor": 1000.0}
    result = result_of(folder)
    assert result["dominant_layer"] == noted == state_of(folder)["notes"]["dominant_layer"]
    assert is_sound_result(result)
    by_number, _ = ran([*words, "method.layers=1"], tmp_path / "named", monkeypatch)
    assert result_of(by_number)["weights"] == result["weights"]
    assert "dominant_layer" not in result_of(by_number)

    never_looked_for()
    _, said = ran([*words, "steps=5"], tmp_path / "found", monkeypatch)
    assert "found at an earlier start" in said
    assert "the same as the run's" in told(["replay", str(folder), "--split", "none"], capsys)
    delta = str(tmp_path / "a.delta")
    told(["export", str(folder), delta, "--delta"], capsys)
    assert "the same as the run's" in told(["replay", delta, "--split", "none"], capsys)
    told(["export", str(folder), str(tmp_path / "model"), "--step", "1"], capsys)
    assert "# dominant layer: block 1 of 2, " in told(["show", "run", str(folder)], capsys)
    told(["eval", str(folder), "--step", "1", "--out", str(tmp_path / "p.jsonl")], capsys)


def test_a_mask_is_of_the_blocks_that_are_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import safe_open

    found_in_block_1()
    words = [*RUN, "method=senszoq", "sparsity=0.9", "method.mask_rows=4", SEQUENTIAL, DOMINANT]
    folder, _ = ran(words, tmp_path, monkeypatch)
    with safe_open(folder / "mask.safetensors", "pt") as mask:
        assert all(name.startswith(BLOCK_1) for name in mask.keys())  # noqa: SIM118  # no mapping


def test_ranks_train_the_layer_that_rank_0_has_found(tmp_path: Path) -> None:
    """Followers are told: they would not find it themselves. Bit for bit the run of one process."""
    words = [*SHORT_RUN, *METHODS["sparse_mezo"], DOMINANT, "method.num_queries=2"]
    alone, many = tmp_path / "alone", tmp_path / "many"
    for size, cwd in ((1, alone), (2, many)):
        cwd.mkdir()
        faults = [few_tokens, found_in_block_1]
        ended = together(size, [*words, f"query_ranks={size}"], cwd, faults=faults)
        assert all(end.code == 0 for end in ended), ended[0].err
    one, two = result_of(run_folder(alone)), result_of(run_folder(many))
    assert one["dominant_layer"] == two["dominant_layer"]
    assert one["weights"] == two["weights"]
    assert two["world_size"] == 2


def test_a_model_without_outliers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *RUN, *MEZO, DOMINANT]) == 2
    said = capsys.readouterr().err
    assert (
        "smezo: method.layers=dominant: no block has an output above 1000 times its median" in said
    )
    assert "give block numbers, such as layers=" in said


def test_a_plan_assumes_a_block(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "model=tiny-llama", "task=toy", "device=cpu", "method=mezo"]
    said = told([*words, DOMINANT], capsys)
    assert "the dominant layer is found by the run: it is block 1" in said
    named = told([*words, "method.layers=1"], capsys)
    assert said.split("assumed")[0] == named.split("assumed")[0]


def test_runs_of_before_keep_their_digest() -> None:
    config = plain(compose([*RUN, *MEZO]))
    before = {**config, "method": {k: v for k, v in config["method"].items() if k != "layers"}}
    assert "layers" in config["method"]
    assert digest(before) == digest(config)
    other = plain(compose([*RUN, *MEZO, "method.layers=1"]))
    assert digest(other) != digest(config)

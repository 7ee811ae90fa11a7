"""Runs whose steps begin at the first trained block, against those of the whole model."""

import contextlib
import io
import json
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from smezo_cli import train
from smezo_cli.cli import evaluate
from smezo_cli.config.compose import compose
from smezo_cli.errors import UserError
from smezo_cli.models import blocks
from smezo_cli.run import kept_inputs
from smezo_cli.run.evaluator import Evaluator
from smezo_cli.scoring.kept_inputs import KeptInputs
from smezo_cli.store.schema import is_sound_result
from smezo_cli.store.trajectory import read
from tests.run.processes import Fault, smezo
from tests.run.rank_groups import RUN, few_tokens, together, weights_of
from tests.run.tiny_runs import (
    METHODS,
    SEQUENTIAL,
    SMALL,
    assert_same_run,
    records_of,
    result_of,
    run_folder,
    words_of,
)

LLAMA = ["method.freeze=['*embed*','model.layers.0.*']"]
OPT = ["method.freeze=['*embed*','model.decoder.layers.0.*']"]
MASKED = ['task.prompt="{text}. It was {mask} ."', "task.labels=[terrible,great]"]
SHORT = ["batch_size=4", "steps=20", "eval_every=5", "zero_shot=false"]
# fp32 losses of size 1 are 1e-7 apart, and a projected gradient divides their difference by
# 2 eps = 2e-3: 1e-4 a few times over, of 20 steps that follow from each other.
LOSSES, GRADIENTS = 1e-5, 2e-3


def finished(words: Sequence[str], place: Path) -> Path:
    """The folder of a run in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        train.run(compose([*words, f"runs_dir={place}"]))
    return run_folder_of(place)


def run_folder_of(place: Path) -> Path:
    (found,) = (path for path in (place / "default").iterdir() if path.is_dir())
    return found


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in records_of(folder) if "loss" in line]


def assert_close(folder: Path, other: Path) -> None:
    """Losses, scalars and metrics to rounding."""
    assert losses_of(folder) == pytest.approx(losses_of(other), abs=LOSSES)
    if (folder / "trajectory.bin").exists():
        mine, theirs = (read(path / "trajectory.bin") for path in (folder, other))
        columns = zip(mine.columns(len(mine)), theirs.columns(len(theirs)), strict=True)
        for ours, its in columns:
            assert list(ours) == pytest.approx(list(its), abs=GRADIENTS)
    for key in ("loss", "accuracy", "n"):
        mine, theirs = result_of(folder)["test"], result_of(other)["test"]
        assert mine[key] == pytest.approx(theirs[key], abs=LOSSES), key


CASES: Mapping[str, Sequence[str]] = {
    "llama": ["model=tiny-llama", "method=mezo", "lr=1e-3", SEQUENTIAL, *LLAMA],
    "lockstep": ["model=tiny-llama", "method=mezo", "lr=1e-3", "method.executor=lockstep", *LLAMA],
    "batched": ["model=tiny-llama", "method=lozo", "lr=1e-3", "method.executor=batched", *LLAMA],
    "batched roberta": [
        *("model=tiny-roberta", "method=mezo", "lr=1e-3", "method.executor=batched", *MASKED),
        "method.freeze=['*embeddings*','*layer.0.*']",
    ],
    "mistral": ["model=tiny-mistral", "method=mezo", "lr=1e-3", SEQUENTIAL, *LLAMA],
    "qwen2": ["model=tiny-qwen2", "method=sparse_mezo", "lr=1e-3", SEQUENTIAL, *LLAMA],
    "gemma3": ["model=tiny-gemma3", "method=mezo_adam", "lr=1e-3", SEQUENTIAL, *LLAMA],
    "opt": ["model=tiny-opt", "method=mezo", "lr=1e-3", "micro_batch_size=2", SEQUENTIAL, *OPT],
    "roberta": [
        *("model=tiny-roberta", "method=mezo", "lr=1e-3", SEQUENTIAL, *MASKED),
        "method.freeze=['roberta.embeddings.*','roberta.encoder.layer.0.*']",
    ],
    "head": [  # all blocks are frozen
        *("model=tiny-opt", "method=mezo", "lr=1e-3", SEQUENTIAL),
        "method.freeze=['*embed*','model.decoder.layers.*']",
    ],
    "adapter": [
        *("model=tiny-llama", "method=mezo_lora", "lr=1e-2", SEQUENTIAL),
        "method.freeze=['model.layers.0.*']",
    ],
    "bfloat16": [
        *("model=tiny-llama", "method=mezo", "lr=1e-3", "compute_dtype=bfloat16", SEQUENTIAL),
        *LLAMA,
    ],
    "backpropagation": ["model=tiny-llama", "method=adamw", "lr=1e-3", *LLAMA],
    "calibrated": [
        *("model=tiny-llama", "method=mezo", "lr=1e-3", SEQUENTIAL, *LLAMA),
        *("task.sfc=true", 'task.sfc_prompt="It was"', 'task.prompt="{text}. It was"'),
        "task.labels=[terrible,great]",
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_of_20_steps_has_the_losses_of_the_whole_model(name: str, tmp_path: Path) -> None:
    words = [*SMALL, *SHORT, *CASES[name]]
    whole = finished(words, tmp_path / "whole")
    kept = finished([*words, "keep_inputs=true"], tmp_path / "kept")
    if name == "bfloat16":  # a loss is known to 3 digits, and a projected gradient to none
        assert losses_of(kept)[0] == pytest.approx(losses_of(whole)[0], abs=0.01)
    else:
        assert_close(kept, whole)
    assert {p.name for p in kept.iterdir()} == {p.name for p in whole.iterdir()}
    assert kept.name != whole.name  # other bits, so another digest
    assert is_sound_result(result_of(kept))
    about = result_of(kept)["kept_inputs"]
    assert about == {"first_block": 2 if name == "head" else 1, "num_blocks": 2}
    assert "kept_inputs" not in result_of(whole)


@pytest.mark.parametrize(
    "more",
    [[], ["prompt_rows=6"], ["task.prompt='{text} So'", "task.labels=[bad,good]"]],
    ids=["prompts", "lots", "prompt"],
)
def test_test_rows_are_scored_from_the_block_on_as_by_the_whole_model(
    more: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    """The first blocks see each row of test once, and each of dev once a prompt that may win."""
    words = [*SMALL, *SHORT, *CASES["llama"], "zero_shot=true", *more]
    whole = finished(words, tmp_path / "whole")
    seen: list[tuple[str, int]] = []
    real = Evaluator._keeps_inputs

    def looking(self: Evaluator, split: str, *rest: Any) -> bool:
        seen.append((split, calls[0]))
        return real(self, split, *rest)

    calls = [0]
    skipping = KeptInputs._skipping

    def counting(self: KeptInputs, number: int, inner: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **keywords: Any) -> Any:
            calls[0] += 1
            return inner(*args, **keywords)

        return skipping(self, number, counted)

    monkeypatch.setattr(Evaluator, "_keeps_inputs", looking)
    monkeypatch.setattr(KeptInputs, "_skipping", counting)
    kept = finished([*words, "keep_inputs=true"], tmp_path / "kept")
    assert [split for split, _ in seen][-1] == "test"
    assert seen[-1][1] == calls[0]  # nothing was computed behind the last evaluation's begin
    looks = [at for split, at in seen if split == "dev"][-4:]  # while training: steps lie between
    assert len(looks) == 4
    for name in ("zero_shot", "zero_shot_calibrated", "prompt"):
        assert result_of(kept)[name] == result_of(whole)[name]
    # What the run says of test is what the whole model says of the weights that it has kept.
    before = (kept / "predictions-test.jsonl").read_bytes()
    with contextlib.redirect_stdout(io.StringIO()):
        assert evaluate.main([str(kept), "--out", str(tmp_path / "again.jsonl")]) == 0
    assert (tmp_path / "again.jsonl").read_bytes() == before


def test_blocks_below_elasticzo_s_tail_may_be_frozen(tmp_path: Path) -> None:
    """Three blocks: one frozen, one by perturbations, one by backpropagation."""
    words = [
        *(*SMALL, *SHORT, *LLAMA, "model=tiny-llama", "model.config.num_hidden_layers=3"),
        *("method=elasticzo", "lr=1e-3", SEQUENTIAL),
    ]
    whole = finished(words, tmp_path / "whole")
    kept = finished([*words, "keep_inputs=auto"], tmp_path / "kept")
    assert_close(kept, whole)
    assert result_of(kept)["kept_inputs"] == {"first_block": 1, "num_blocks": 3}


def test_where_all_is_trained_auto_keeps_nothing_and_changes_no_bit(tmp_path: Path) -> None:
    words = [*SMALL, *SHORT, "model=tiny-llama", "method=mezo", "lr=1e-3", SEQUENTIAL]
    folders = [
        finished([*words, f"keep_inputs={how}"], tmp_path / how) for how in ("false", "auto")
    ]
    assert weights_of(folders[0]) == weights_of(folders[1])
    assert records_of(folders[0]) == records_of(folders[1])
    assert result_of(folders[1])["kept_inputs"] is None
    assert "kept    nothing: keep_inputs=auto: model.embed_tokens.weight is trained" in (
        folders[1] / "console.log"
    ).read_text(encoding="utf-8")


def test_a_file_gives_the_bits_that_memory_gives(tmp_path: Path, monkeypatch: Any) -> None:
    words = [*SMALL, *SHORT, *CASES["llama"], "keep_inputs=true"]
    held = finished(words, tmp_path / "held")
    for free in (0, 4 * 20_000):  # all in the file; some
        monkeypatch.setattr(kept_inputs, "available_bytes", lambda free=free: free)
        filed = finished(words, tmp_path / str(free))
        assert "MB in the run folder" in (filed / "console.log").read_text(encoding="utf-8")
        assert_same_run(filed, held)


@pytest.mark.parametrize("method", ["mezo", "adamw"])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(method: str, tmp_path: Path) -> None:
    """The second start keeps the rows that it comes upon, in another order."""
    of = "mezo" if method == "mezo" else "adamw"
    words = [
        *words_of(of, *("model=tiny-llama", *LLAMA), "keep_inputs=true"),
        "zero_shot=false",
    ]
    assert smezo(words, tmp_path / "once").code == 0
    # The 15th loss is in the 8th step; adamw has one a step.
    fault = Fault("loss", 15 if method == "mezo" else 8, signal.SIGKILL)
    assert smezo(words, tmp_path / "killed", faults=[fault.install]).code != 0
    assert smezo(words, tmp_path / "killed").code == 0
    assert_same_run(run_folder(tmp_path / "killed"), run_folder(tmp_path / "once"))


@pytest.mark.parametrize(
    ("more", "alone"),
    [([], ["micro_batch_size=4"]), (["method.num_queries=3", "query_ranks=2"], [])],
)
def test_ranks_keep_their_rows_and_make_the_steps_of_one(
    more: list[str], alone: list[str], tmp_path: Path
) -> None:
    words = [*METHODS["mezo"], "model=tiny-llama", *LLAMA, *RUN, "keep_inputs=true", *more]
    ended = together(2, words, tmp_path / "many", [few_tokens])
    assert [one.code for one in ended] == [0, 0], ended[0].err
    by_one = [word for word in words if not word.startswith("query_ranks")]
    assert smezo([*by_one, *alone], tmp_path / "one", faults=[few_tokens]).code == 0
    many, one = run_folder(tmp_path / "many"), run_folder(tmp_path / "one")
    assert weights_of(many) == weights_of(one)
    assert records_of(many) == records_of(one)
    assert result_of(many)["kept_inputs"] == {"first_block": 1, "num_blocks": 2}
    left = [path for path in (tmp_path / "many" / "rank1").rglob("*") if path.is_file()]
    assert all(path.suffix in (".out", ".err") for path in left)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=mezo"], "model.embed_tokens.weight is trained"),
        (["method=mezo", "method.freeze=['*embed*']"], "model.layers.0.self_attn"),
        (["method=mezo_prefix", "lr=1e-2"], "a prefix has keys and values in every block"),
        (
            [*CASES["roberta"][:1], "method=adamw", *CASES["roberta"][4:]],
            "the model drops activations at random",
        ),
        (["method=zero_shot"], "keep_inputs=true"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    words: list[str], said: str, tmp_path: Path
) -> None:
    short = [] if "method=zero_shot" in words else [*SHORT, "lr=1e-3"]
    command = [*SMALL, *short, "model=tiny-llama", *words, "keep_inputs=true"]
    with pytest.raises(UserError) as found:
        finished(_last_of_each(command), tmp_path)
    assert said in str(found.value)
    assert str(found.value).count(". ") == 0


def _last_of_each(words: Sequence[str]) -> list[str]:
    return list({word.partition("=")[0]: word for word in words}.values())


def test_the_words_that_a_refusal_advises_let_the_run_go(tmp_path: Path) -> None:
    words = [*SMALL, *SHORT, "model=tiny-llama", "method=mezo", "lr=1e-3", "keep_inputs=true"]
    with pytest.raises(UserError) as found:
        finished(words, tmp_path / "refused")
    (advised,) = [w for w in shlex.split(str(found.value).replace(", or", " or")) if "freeze=" in w]
    folder = finished([*words, advised], tmp_path / "done")
    assert result_of(folder)["status"] == "done"


def test_another_make_of_model_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(blocks, "_FAMILIES", {})
    words = [*SMALL, *SHORT, *CASES["llama"], "keep_inputs=true"]
    with pytest.raises(UserError, match="LlamaForCausalLM is not one of Llama, Mistral"):
        finished(words, tmp_path)


def test_scores_that_would_be_others_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    """Whatever a model may do between its blocks."""
    real: Callable[..., Any] = kept_inputs.KeptInputs.__dict__["_computed"]
    monkeypatch.setattr(
        kept_inputs.KeptInputs,
        "_computed",
        lambda self, group: [of * 1.1 for of in real(self, group)],
    )
    words = [*SMALL, *SHORT, *CASES["llama"], "keep_inputs=true"]
    with pytest.raises(UserError, match="which is more than rounding: leave keep_inputs out"):
        finished(words, tmp_path)
    written = json.loads((run_folder_of(tmp_path) / "result.json").read_text(encoding="utf-8"))
    assert written["status"] == "failed"

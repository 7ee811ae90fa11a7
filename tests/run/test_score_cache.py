"""Runs that take the scores of the untouched model from earlier runs (``cache_scores``)."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from smezo_cli.files.sealed import sealed
from smezo_cli.models.tiny import byte_tokenizer
from smezo_cli.run import evaluate
from tests.run.in_process import finished, said
from tests.run.processes import smezo
from tests.run.rank_groups import few_tokens, together
from tests.run.tiny_runs import METHODS, SMALL, assert_same_run, flip, result_of, run_folder

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = [*SMALL, "model=tiny-llama", "steps=2", "eval_every=1", "batch_size=4", "lr=1e-3"]
WORDS += ["cache_scores=true"]
MEZO = [*WORDS, "method=mezo", "method.executor=sequential"]
NUM_DEV, NUM_TEST = 16, 24
WHOLE = [NUM_DEV, NUM_DEV, NUM_TEST]  # two prompts, and zero-shot
TRAINED = [NUM_DEV, NUM_DEV, NUM_TEST]  # two evaluations of dev, and the test


def assert_same_scores(folder: Path, other: Path) -> None:
    """What a method without steps leaves, bit for bit."""
    for name in ("predictions-test.jsonl", "scores.safetensors"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    for key in ("prompt", "zero_shot", "test", "dev"):
        assert result_of(folder)[key] == result_of(other)[key]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the scores."""
    monkeypatch.setenv("SMEZO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scores"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each evaluation has computed."""
    found, real = [], evaluate.evaluate

    def counting(*given: Any) -> Any:
        rows, part = given[1], given[5]
        found.append(len(rows) - len(part.scored))
        return real(*given)

    monkeypatch.setattr(evaluate, "evaluate", counting)
    return found


def test_another_seed_and_method_takes_the_scores_and_has_the_same_bits(
    cache: Path, computed: list[int], tmp_path: Path
) -> None:
    finished(MEZO, tmp_path / "first")
    assert computed == [*WHOLE, *TRAINED]
    assert len(list(cache.iterdir())) == 3
    for k, words in enumerate((["seed=1"], ["method=adamw", "~method.executor"])):
        more = [*MEZO, *words] if k == 0 else [*WORDS, words[0]]
        computed.clear()
        taken = finished(more, tmp_path / f"taken{k}")
        assert computed == [0, 0, 0, *TRAINED]
        assert said(taken).count("scores of an earlier run (cache_scores=false") == 3
        anew = finished([*more, "cache_scores=false"], tmp_path / f"anew{k}")
        assert_same_run(taken, anew)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize(
    "more",
    [
        ["compute_dtype=bfloat16"],
        ["+model.config.rms_norm_eps=1e-3"],
        ["model.attention=eager"],
        ["task.num_test=23", "task.num_dev=15"],
        ["task.data_seed=1"],
    ],
)
def test_what_scores_follow_from_must_be_the_same(
    more: list[str], cache: Path, computed: list[int], tmp_path: Path
) -> None:
    words = [*SMALL, "model=tiny-llama", "method=zero_shot", "cache_scores=true"]
    finished(words, tmp_path / "first")
    more = [word.removeprefix("task.") if "data_seed" in word else word for word in more]
    computed.clear()
    finished([*words, *more], tmp_path / "other")
    assert 0 not in computed
    assert len(list(cache.iterdir())) == 6


def test_another_number_of_threads_is_another_machine(
    cache: Path, computed: list[int], tmp_path: Path
) -> None:
    words = [*SMALL, "model=tiny-llama", "method=zero_shot", "cache_scores=true"]
    finished(words, tmp_path / "one")
    torch.set_num_threads(2)  # the fixture has one, and puts back what was
    computed.clear()
    finished(words, tmp_path / "two")
    assert 0 not in computed


@pytest.mark.parametrize("harm", ["damaged", "foreign", "cut", "of other rows"])
def test_what_is_not_what_was_kept_is_computed_and_kept_anew(
    harm: str, cache: Path, computed: list[int], tmp_path: Path
) -> None:
    words = [*SMALL, "model=tiny-llama", "method=zero_shot", "cache_scores=true"]
    first = finished(words, tmp_path / "first")
    whole = {path: path.read_bytes() for path in cache.iterdir()}
    for path in whole:
        content = json.loads(path.read_text(encoding="utf-8"))
        if harm == "damaged":
            flip(path, 0.5)
        elif harm == "cut":
            path.write_bytes(whole[path][:-20])
        elif harm == "foreign":
            path.write_text(json.dumps(sealed(content | {"about": {}})), encoding="utf-8")
        else:
            fewer = content | {"scores": content["scores"][1:]}
            path.write_text(json.dumps(sealed(fewer)), encoding="utf-8")
    computed.clear()
    again = finished(words, tmp_path / "again")
    assert computed == WHOLE
    assert_same_scores(again, first)
    assert {path: path.read_bytes() for path in cache.iterdir()} == whole


def test_answers_are_kept_too(cache: Path, computed: list[int], tmp_path: Path) -> None:
    task = tmp_path / "faq.jsonl"
    rows = [{"question": f"What is {k}?", "answer": f"it is {k}"} for k in range(40)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = [
        *("task=generation", f"task.data={task}", "task.prompt='Q: {question} A:'", "device=cpu"),
        *("task.max_new_tokens=3", "model=tiny-llama", "method=zero_shot", "cache_scores=true"),
    ]
    first = finished(words, tmp_path / "first")
    count = len(computed)
    second = finished(words, tmp_path / "second")
    assert computed[count:] == [0] * count
    assert_same_scores(second, first)


def test_a_folder_that_cannot_be_written_is_said_and_costs_nothing_else(
    cache: Path, tmp_path: Path
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder would be", encoding="utf-8")
    folder = finished(
        [*SMALL, "model=tiny-llama", "method=zero_shot", "cache_scores=true"], tmp_path
    )
    assert result_of(folder)["status"] == "done"
    assert said(folder).count("scores are not kept for other runs: cannot write") == 3


ADAPTERS = ["mezo_lora", "p_rge", "mezo_prefix", "adazeta", "prefix"]
TIMED = ("mezo_lora", "mezo_prefix", "adazeta")  # their executor would hang on the clock


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_model_whose_adapter_is_off_is_the_same_with_any_seed(
    method: str, cache: Path, computed: list[int], tmp_path: Path
) -> None:
    """An adapter begins with numbers that the seed draws, which no zero-shot score hangs on."""
    words = [*WORDS, f"method={method}"]
    words += ["method.executor=sequential"] if method in TIMED else []
    finished(words, tmp_path / "first")
    assert computed == [*WHOLE, *TRAINED]
    computed.clear()
    taken = finished([*words, "seed=1"], tmp_path / "taken")
    assert computed == [0, 0, 0, *TRAINED]
    assert_same_run(taken, finished([*words, "seed=1", "cache_scores=false"], tmp_path / "anew"))
    assert len(list(cache.iterdir())) == 3


def test_what_is_kept_is_of_the_base_model_and_of_the_kind_of_adapter(
    cache: Path, computed: list[int], tmp_path: Path
) -> None:
    lora = [*WORDS, "method=mezo_lora"]
    others = (["method.adapter.r=2"], ["model.config.hidden_size=48"])
    for k, more in enumerate(([], *others)):
        computed.clear()
        finished([*lora, *more], tmp_path / str(k))
        assert computed == [*WHOLE, *TRAINED]
    computed.clear()
    finished([*WORDS, "method=mezo"], tmp_path / "dense")
    assert computed == [*WHOLE, *TRAINED]


def test_other_weights_of_a_base_of_one_shape_are_told_apart(
    cache: Path, computed: list[int], tmp_path: Path
) -> None:
    byte_tokenizer(add_bos=False).save_pretrained(tmp_path / "saved")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=335, num_attention_heads=2, num_key_value_heads=2, **sizes)
    others = [word for word in WORDS if not word.startswith("model=")]
    own = ["model=own", f"model.path={tmp_path / 'saved'}", "model.max_length=128"]
    for k in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(k)
            LlamaForCausalLM(config).save_pretrained(tmp_path / "saved")
        computed.clear()
        finished([*others, *own, "method=mezo_lora"], tmp_path / str(k))
        assert computed == [*WHOLE, *TRAINED]
    assert len(list(cache.iterdir())) == 6


def test_the_scores_beside_a_probe_are_those_of_the_model_alone(
    cache: Path, tmp_path: Path
) -> None:
    """And the probe's are computed, though their rows are the same."""
    words = [*SMALL, "model=tiny-llama", "method=linear_probe"]
    anew = finished(words, tmp_path / "anew")
    for place in ("kept", "taken"):
        probed = finished([*words, "cache_scores=true"], tmp_path / place)
        assert_same_run(probed, anew)
        assert len(list(cache.iterdir())) == 3
    assert result_of(anew)["test"]["loss"] != result_of(anew)["zero_shot"]["loss"]


def test_scores_behind_demonstrations_are_kept_as_such(cache: Path, tmp_path: Path) -> None:
    words = [*SMALL, "model=tiny-llama", "method=icl", "method.num_demonstrations=2"]
    anew = finished(words, tmp_path / "anew")
    for place in ("kept", "taken"):
        assert_same_run(finished([*words, "cache_scores=true"], tmp_path / place), anew)
    behind = [
        json.loads(path.read_text("utf-8"))["about"]["forwards"][1] for path in cache.iterdir()
    ]
    assert sorted(behind) == [
        False,
        False,
        False,
        True,
        True,
    ]  # of these what all begin with is held


def in_cache(folder: str) -> None:
    """Use a cache folder in a process that is started, and score rows some at a time."""
    few_tokens()
    os.environ["SMEZO_CACHE"] = folder


def test_ranks_take_what_one_has_kept(cache: Path, tmp_path: Path) -> None:
    use = partial(in_cache, str(cache.parent))
    words = [*SMALL, *METHODS["mezo"], "steps=2", "batch_size=8", "cache_scores=true"]
    one = smezo([*words, "micro_batch_size=4"], tmp_path / "one", faults=[use])
    assert one.code == 0, one.err
    ended = together(2, words, tmp_path / "many", [use])
    assert [of.code for of in ended] == [0, 0], ended[0].err
    many = run_folder(tmp_path / "many")
    assert said(many).count("scores of an earlier run") == 3
    for name in ("zero_shot", "prompt", "test"):
        assert result_of(many)[name] == result_of(run_folder(tmp_path / "one"))[name]

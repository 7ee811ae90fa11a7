"""Runs that take what enters the first trained block from earlier runs (``cache_inputs``)."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from smezo_cli.config.compose import compose
from smezo_cli.run import input_cache
from smezo_cli.store.input_cache import InputCache, remove_oldest
from tests.run.in_process import finished, said
from tests.run.processes import smezo
from tests.run.rank_groups import few_tokens, together
from tests.run.tiny_runs import SEQUENTIAL, SMALL, assert_same_run, flip, result_of, run_folder

pytestmark = pytest.mark.usefixtures("one_thread")

FREEZE = "method.freeze=['*embed*','model.layers.0.*']"
WORDS = [
    *(*SMALL, "model=tiny-llama", FREEZE, "steps=4", "batch_size=4", "eval_every=2", "lr=1e-3"),
    *("keep_inputs=true", "cache_inputs=true", "cache_scores=true"),
]
MEZO = [*WORDS, "method=mezo", SEQUENTIAL]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the inputs."""
    monkeypatch.setenv("SMEZO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "inputs"


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What was read and written, a pair a run."""
    found = list[list[int]]()
    get, put, of = InputCache.get, InputCache.put, input_cache.of

    def begun(*given: Any) -> Any:
        found.append([0, 0])
        return of(*given)

    def reading(self: InputCache, key: Any) -> Any:
        tensors = get(self, key)
        found[-1][0] += tensors is not None
        return tensors

    def writing(self: InputCache, key: Any, tensors: Any) -> None:
        found[-1][1] += 1
        put(self, key, tensors)

    monkeypatch.setattr(input_cache, "of", begun)
    monkeypatch.setattr(InputCache, "get", reading)
    monkeypatch.setattr(InputCache, "put", writing)
    return found


def files(cache: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in cache.rglob("*.safetensors")}


def test_other_seeds_and_methods_compute_no_frozen_block_and_have_the_same_bits(
    cache: Path, counts: list[list[int]], tmp_path: Path
) -> None:
    finished(MEZO, tmp_path / "first")
    kept = files(cache)
    assert counts[0] == [1, len(kept)]  # test is scored twice
    assert len(kept) > 0
    for k, words in enumerate(([*MEZO, "seed=1"], [*WORDS, "method=adamw"])):
        taken = finished(words, tmp_path / f"taken{k}")
        assert counts[-1][0] > 0
        assert counts[-1][1] == 0  # of test, dev and every row of a step
        assert "and in the cache for other runs" in said(taken)
        off = ["cache_inputs=false", "cache_scores=false"]
        assert_same_run(taken, finished([*words, *off], tmp_path / f"anew{k}"))
    assert files(cache) == kept


@pytest.mark.parametrize(
    "more",
    [
        ["compute_dtype=bfloat16"],
        ["+model.config.rms_norm_eps=1e-3"],
        ["model.attention=eager"],
        ["model.tiny.seed=1"],
        ["model.config.num_hidden_layers=3", "method.freeze=['*embed*','model.layers.[01].*']"],
    ],
    ids=["dtype", "config", "attention", "weights", "block"],
)
def test_what_the_states_follow_from_must_be_the_same(
    more: list[str], cache: Path, counts: list[list[int]], tmp_path: Path
) -> None:
    finished(MEZO, tmp_path / "first")
    finished([*MEZO, *more], tmp_path / "other")
    assert counts[1] == counts[0]
    assert len(list(cache.iterdir())) == 2


def test_rows_of_other_batches_are_computed(
    cache: Path, counts: list[list[int]], tmp_path: Path
) -> None:
    """Another split has other batches; what is shared is taken, and nothing else."""
    finished(MEZO, tmp_path / "first")
    other = [*MEZO, "task.num_test=23"]
    taken = finished(other, tmp_path / "other")
    assert min(counts[1]) > 0
    anew = finished([*other, "cache_inputs=false", "cache_scores=false"], tmp_path / "anew")
    assert_same_run(taken, anew)


@pytest.mark.parametrize("harm", ["damaged", "cut", "of another", "empty"])
def test_what_is_not_what_was_kept_is_computed_and_kept_anew(
    harm: str, cache: Path, counts: list[list[int]], tmp_path: Path
) -> None:
    words = [*MEZO, "cache_scores=false"]
    first = finished(words, tmp_path / "first")
    whole = files(cache)
    for path, content in whole.items():
        if harm == "damaged":
            flip(path, 0.9)
        elif harm == "cut":
            path.write_bytes(content[:-20])
        elif harm == "empty":
            path.write_bytes(b"")
        else:
            path.write_text("no tensors")
    again = finished(words, tmp_path / "again")
    assert counts[1][1] == len(whole)
    assert_same_run(again, first)
    assert files(cache) == whole


def test_a_folder_that_cannot_be_written_is_said_once_and_costs_nothing_else(
    cache: Path, tmp_path: Path
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder would be", encoding="utf-8")
    folder = finished(MEZO, tmp_path)
    assert result_of(folder)["status"] == "done"
    assert said(folder).count("kept    no more in the cache, for other runs:") == 1


def test_without_kept_inputs_a_line_says_that_nothing_is_cached(
    cache: Path, tmp_path: Path
) -> None:
    folder = finished([*MEZO, "keep_inputs=false"], tmp_path)
    assert "kept    nothing in the cache: keep_inputs=false" in said(folder)
    assert not cache.exists()


def test_it_changes_no_digest() -> None:
    from smezo_cli.config.digest import digest

    assert digest(compose(MEZO)) == digest(compose([*MEZO, "cache_inputs=false"]))


def in_cache(folder: str) -> None:
    """Use a cache folder in a process that is started, and score rows some at a time."""
    few_tokens()
    os.environ["SMEZO_CACHE"] = folder


def test_ranks_take_what_one_has_kept_with_the_same_bits(cache: Path, tmp_path: Path) -> None:
    use = partial(in_cache, str(cache.parent))
    words = [*MEZO, "batch_size=8", "micro_batch_size=4", "cache_scores=false"]
    one = smezo(words, tmp_path / "one", faults=[use])
    assert one.code == 0, one.err
    kept = files(cache)
    ended = together(2, words, tmp_path / "many", [use])
    assert [of.code for of in ended] == [0, 0], ended[0].err
    for name in ("zero_shot", "prompt", "test"):
        assert (
            result_of(run_folder(tmp_path / "many"))[name]
            == result_of(run_folder(tmp_path / "one"))[name]
        )
    assert files(cache) == kept


def test_files_used_longest_ago_are_removed_first(tmp_path: Path) -> None:
    said = list[str]()
    caches = [InputCache(tmp_path, {"of": k}, said.append) for k in range(3)]
    for k, cache in enumerate(caches):
        cache.put(["rows", [[k]]], [torch.full((100,), float(k))])
        (path,) = (p for p in tmp_path.glob("*/*") if p.stat().st_mtime > 1000)
        os.utime(path, (k + 1, k + 1))
    assert caches[0].get(["rows", [[0]]]) is not None  # used now
    size = next(tmp_path.glob("*/*")).stat().st_size
    assert remove_oldest(tmp_path, 3 * size) == 0
    assert remove_oldest(tmp_path, 2 * size) == size
    assert [c.get(["rows", [[k]]]) is not None for k, c in enumerate(caches)] == [True, False, True]
    assert said == []


def test_each_key_has_its_own_tensors(tmp_path: Path) -> None:
    cache = InputCache(tmp_path, {}, print)
    keys = [["rows", [[1, 2], [3]]], ["rows", [[1], [2, 3]]], ["batch", [[1, 2], [3]]]]
    for k, key in enumerate(keys):
        cache.put(key, [torch.tensor([k]), torch.tensor([[k + 0.5]], dtype=torch.bfloat16)])
    for k, key in enumerate(keys):
        found = cache.get(key)
        assert found is not None
        assert found[0].item() == k
        assert found[1].dtype == torch.bfloat16
        assert found[1].item() == k + 0.5
    assert cache.get(["rows", [[1, 2]]]) is None

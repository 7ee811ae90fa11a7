"""`smezo plan`: its counts against real tensors, its directions, its words."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from smezo_cli.cli import verbs
from smezo_cli.cli.plan import parse_memory
from smezo_cli.config.compose import compose
from smezo_cli.config.settings import Settings, check
from smezo_cli.errors import UserError
from smezo_cli.models.load import load_model
from smezo_cli.plan.dry_run import architecture
from smezo_cli.plan.planner import Plan, plan
from smezo_cli.plan.trace import trace

TINY = ("task=toy", "model=tiny-llama", "steps=20", "eval_every=10")
WEIGHTS = 37_472  # of tiny-llama, its tied embedding once


def settings_of(*words: str) -> Settings:
    return check(compose([*words, "device=cpu"]))


@functools.cache
def planned(*words: str, tokens: int | None = 64) -> Plan:
    return plan(settings_of(*TINY, *words), capacity=10**9, tokens=tokens)


def tiny_model(settings: Settings) -> Any:
    model, _ = load_model(
        settings.model,
        dtype=getattr(torch, settings.dtype),
        device=torch.device("cpu"),
        cache=Path("unused"),
    )
    return model


# --- counting ---------------------------------------------------------------------------------


@pytest.fixture
def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(4, 2)).to("meta")


def test_without_gradients_two_neighbours_live_at_once(layers: nn.Module) -> None:
    x = torch.empty(5, 8, device="meta")
    with torch.no_grad():
        peak, left = trace([x, *layers.parameters()], lambda: layers(x))
    assert (peak, left) == (5 * (16 + 4) * 4, 0)


def test_with_gradients_what_backward_reads_stays_until_then(layers: nn.Module) -> None:
    x = torch.empty(5, 8, device="meta")
    kept: list[Any] = []
    _, left = trace([x, *layers.parameters()], lambda: kept.append(layers(x)))
    assert left == 5 * (16 + 4 + 2) * 4


def test_what_is_kept_is_what_is_left() -> None:
    kept: list[Any] = []
    _, left = trace([], lambda: kept.append(torch.empty(100, device="meta").view(10, 10)))
    assert left == 400  # and the view costs nothing


# --- exact figures ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "weights"), [("opt-13b", 12_853_473_280), ("llama-7b", 6_738_415_616)]
)
def test_weights_of_the_papers_models(model: str, weights: int) -> None:
    settings = check(compose([f"model={model}", "task=multirc", "device=cuda"]))
    found = plan(settings, capacity=80 * 10**9, tokens=64)
    assert found.resident["weights"] == 2 * weights  # float16; a tied embedding counts once


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_weights_of_the_twin(dtype: str, size: int) -> None:
    assert planned(f"dtype={dtype}").resident["weights"] == WEIGHTS * size


@pytest.mark.parametrize("method", ["adamw", "sgd"])
def test_optimizer_state_is_that_of_a_step(method: str) -> None:
    from smezo_cli.config.build import build

    settings = settings_of(*TINY, f"method={method}")
    model = tiny_model(settings)
    real = build(settings.method, "method", model=model, seed=0)
    real.step(lambda: model(torch.ones(1, 4, dtype=torch.int64)).logits.square().mean())
    _, tensors = real.snapshot()
    state = sum(t.numel() * t.element_size() for t in tensors.values())
    assert planned(f"method={method}").resident.get("optimizer state", 0) == state


@pytest.mark.parametrize("executor", ["sequential", "lockstep"])
@pytest.mark.parametrize("freeze", ["[]", '["*embed_tokens*","*norm*"]'])
def test_scratch_is_that_of_a_real_probe(freeze: str, executor: str) -> None:
    from smezo_cli.config.build import build
    from smezo_cli.plan.trace import PadOnly
    from smezo_cli.scoring.candidates import Candidates
    from smezo_cli.scoring.scorer import Scorer

    words = ["method=mezo", f"method.freeze={freeze}", f"method.executor={executor}"]
    settings = settings_of(*TINY, *words)
    model = tiny_model(settings)
    method = build(settings.method, "method", model=model, seed=0, backend="eager", check=False)
    row = Candidates(((5,) * 16, (*(5,) * 15, 6)), (1, 1), 0, False)
    method.step(lambda: Scorer(model, PadOnly()).loss([row]))
    real = sum(t.numel() * t.element_size() for t in method._probe._scratch.values())
    assert planned(*words).resident["scratch of probes"] == real


def test_a_frozen_tensor_has_no_gradient_and_no_state() -> None:
    free = planned("method=adamw")
    frozen = planned("method=adamw", 'method.freeze=["*embed_tokens*"]')
    embedding = 334 * 32 * 4
    saved = free.resident["optimizer state"] - frozen.resident["optimizer state"]
    assert saved == 2 * embedding + 4  # two moments, and the count of steps
    assert free.disk - frozen.disk == embedding


# --- directions -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mezo", "sparse_mezo", "adamw"])
def test_more_rows_or_tokens_take_more(method: str) -> None:
    stage = "forward and backward, gradients included" if method == "adamw" else "step"
    words = (f"method={method}", "compile=true") if "mezo" in method else (f"method={method}",)
    base = planned(*words).phases[stage]
    rows = planned(*words, "batch_size=32").phases[stage]
    tokens = planned(*words, tokens=128).phases[stage]
    narrow = planned(*words, "dtype=bfloat16").phases[stage]
    assert rows > 1.4 * base
    assert tokens > 1.4 * base
    assert narrow < base


def test_eager_attention_stores_its_scores() -> None:
    fused, eager = (
        planned("method=adamw", f"model.attention={name}", tokens=256).phases[
            "forward and backward, gradients included"
        ]
        for name in ("sdpa", "eager")
    )
    scores = 16 * 4 * 256**2 * 4  # rows, heads, tokens squared, float32
    assert eager - fused > 1.5 * scores  # of two layers, less what the other way keeps


def test_noise_is_kept_where_nothing_compiles() -> None:
    eager = planned("method=mezo", "compile=false").phases["step"]
    compiled = planned("method=mezo", "compile=true").phases["step"]
    assert eager - compiled == 5 * WEIGHTS
    in_place = planned("method=mezo", "method.executor=in_place")
    assert in_place.phases["step"] > 9 * WEIGHTS
    assert "scratch of probes" not in in_place.resident


def test_a_method_without_gradients_takes_less() -> None:
    without = planned("method=sparse_mezo", "compile=true")
    assert without.peak - without.resident["Numba"] < planned("method=adamw").peak


def test_answers_need_keys_and_values() -> None:
    words = ("task=generation", "task.data=my.csv", 'task.prompt="{text} A:"', "task.num_test=10")
    found = planned(*words, tokens=128)
    one_layer = 16 * 127 * 2 * 32 * 4  # rows, tokens, keys and values, width
    assert found.phases["answers"] > 2 * one_layer
    assert "answers of task.max_new_tokens=50 tokens" in found.assumptions


def test_whole_vocabulary_where_options_are_long() -> None:
    choice = ("task=choice", "task.data=my.csv", "task.prompt='{text}'", "task.options=[a,b]")
    stage = "forward and backward, gradients included"

    def growth(*words: str) -> int:
        wide = planned(*words, "method=adamw", "model.config.vocab_size=5000").phases[stage]
        return wide - planned(*words, "method=adamw").phases[stage]

    logits = 16 * 16 * (5000 - 334) * 4  # rows, option tokens, words, float32
    assert growth(*choice) > logits
    assert growth() < logits


@pytest.mark.parametrize("model", ["tiny-opt", "tiny-gemma3", "tiny-mistral", "tiny-qwen2"])
def test_every_twin_has_a_plan(model: str) -> None:
    found = planned(f"model={model}", "method=sparse_mezo")
    assert found.fits
    assert all(size > 0 for size in {**found.resident, **found.phases}.values())


def test_masked_models_have_a_plan() -> None:
    found = plan(settings_of("task=rte", "model=roberta-large"), capacity=10**11, tokens=64)
    assert found.resident["weights"] == 355_412_057 * 4


def test_compute_dtype_narrows_what_is_between_the_weights() -> None:
    words = ("method=mezo", "compile=true", "batch_size=64")
    plain, narrow = planned(*words), planned(*words, "compute_dtype=bfloat16")
    assert plain.resident == narrow.resident
    assert narrow.phases["step"] < plain.phases["step"]


# --- disk and work ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "files", "while_saving"),
    [
        (("keep=best",), 1, 2),
        (("keep=best", "full_save_every=5"), 2, 3),
        (("keep=best", "full_save_every=5", "lr_schedule=linear"), 1, 3),
        (("keep=last", "eval_every=2"), 1, 1),
        (("keep=all", "eval_every=2"), 10, 10),
    ],
)
def test_disk(words: tuple[str, ...], files: int, while_saving: int) -> None:
    found = planned("method=mezo", *words)
    assert (found.disk, found.disk_peak) == (files * WEIGHTS * 4, while_saving * WEIGHTS * 4)


@pytest.mark.parametrize(
    ("words", "files", "while_saving"),
    [(("keep=best",), 2, 2), (("keep=best", "lr_schedule=linear"), 1, 2), (("keep=last",), 1, 2)],
)
def test_disk_of_a_method_whose_steps_are_not_recorded(
    words: tuple[str, ...], files: int, while_saving: int
) -> None:
    """The best and the last weights; with an optimizer that has no state."""
    found = planned("method=sgd", "eval_every=10", *words)
    assert (found.disk, found.disk_peak) == (files * WEIGHTS * 4, while_saving * WEIGHTS * 4)


def test_forwards_are_two_a_query() -> None:
    work = planned("method=mezo", "method.num_queries=3", "batch_size=8").work
    assert work["forwards of training"] == 20 * 6
    assert work["tokens in them, at most"] == 20 * 6 * 8 * 64


# --- words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("24GiB", 24 << 30), ("1.5 g", 1_500_000_000), ("512MiB", 1 << 29)],
)
def test_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "80", "lots", "-8GB", "0GB", "80GW", f"{10**400}GB"])
def test_memory_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match=r"--memory .* is no amount of memory.*--memory 80GB\.$"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--memory", "lots"), "--memory lots is no amount"),
        (("--tokens", "9999"), "--tokens 9999 must be a whole number from 4 to model.max_length="),
        (("--tokens", "few"), "such as --tokens "),
        (("--mem", "1GB"), "smezo plan --help"),
        (("stepz=3",), "did you mean steps"),
        (("batch_size=1000000000000",), "1,000,000,000,000 rows at once: a plan counts at most"),
        ((f"lr={10**400}",), "lr must be a number"),
        ((f"steps={10**400}",), "steps must be a whole number"),
        (("model=own", "model.path=no/such"), "model.path=FOLDER"),
        (("model=own", "model.path=no:such"), "model.path=FOLDER"),
        (("method=adamw", 'method.freeze=["*nothing*"]'), "matches no trainable parameter"),
    ],
)
def test_a_mistake_is_a_sentence(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [word for word in TINY if not (word.startswith("model=") and "model=own" in words)]
    assert verbs.main(["plan", *base, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="has such a device")
def test_an_absent_device_needs_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.main(["plan", *TINY, "device=cuda"]) == 2
    assert "--memory 80GB" in capsys.readouterr().err
    assert verbs.main(["plan", *TINY, "device=cuda", "--memory", "80GB"]) == 0
    assert "memory of the host" in capsys.readouterr().out


def test_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.main(["plan", *TINY, "--memory", "1MB", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["capacity"] == 1_000_000
    assert record["fits"] is False
    assert record["peak"] == sum(record["resident"].values()) + max(record["phases"].values())


def test_time_is_what_a_bench_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "model": "tiny-llama",
        "dtype": "float32",
        "compute_dtype": "float32",
        "batch_size": 4,
        "length": 32,
        "median_seconds": {"mezo": 0.25},
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(record))
    words = ["task=toy", "model=tiny-llama", "batch_size=4", "steps=20", "--bench", str(path)]
    assert verbs.main(["plan", *words, "method=mezo", "--json"]) == 0
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    assert seconds == {"step": 0.25, "rows": 4, "tokens": 32, "steps": 5.0}
    assert verbs.main(["plan", *words, "method=mezo"]) == 0
    assert "a step of 4 rows of 32 tokens, measured" in capsys.readouterr().out
    for change, says in (
        (["method=sparse_mezo"], "holds no step of method sparse_mezo"),
        (["method=mezo", "dtype=bfloat16"], "is of dtype=float32, and this run has bfloat16"),
        (["method=mezo", "batch_size=8"], "smezo bench batch_size=8 --json FILE"),
        (["method=mezo", "--bench", str(tmp_path / "none")], "is no file of smezo bench"),
    ):
        assert verbs.main(["plan", *words, *change]) == 2
        assert says in capsys.readouterr().err


def test_for_readers(capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.main(["plan", *TINY, "--memory", "1MB"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("toy | tiny-llama | sparse_mezo | float32 weights")
    assert "it does NOT fit" in out
    assert verbs.main(["plan", "--help"]) == 0
    assert "--memory" in capsys.readouterr().out


def test_a_folder_of_ones_own_is_read(tmp_path: Path) -> None:
    settings = settings_of(*TINY)
    tiny_model(settings).save_pretrained(tmp_path / "mine")
    own = settings_of(
        "task=toy", "model=own", f"model.path={tmp_path / 'mine'}", "model.max_length=256"
    )
    assert architecture(own.model)["config"]["hidden_size"] == 32
    found = plan(own, capacity=10**9, tokens=64)
    assert found.resident["weights"] == WEIGHTS * 4


def test_completion_offers_flags_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.main(["completion", "query", "smezo plan --m"]) == 0
    assert capsys.readouterr().out.split() == ["--memory"]
    assert verbs.main(["completion", "query", "smezo plan model=tiny-l"]) == 0
    assert capsys.readouterr().out.split() == ["model=tiny-llama"]


def test_an_objective_takes_the_memory_of_what_it_computes() -> None:
    """Accuracy of choices scores every option, not the gold one alone; F1 generates answers."""
    choice = ("task=copa", "method=mezo")
    loss, accuracy = (
        planned(*choice, f"method.objective={objective}").phases["step"]
        for objective in ("loss", "accuracy")
    )
    assert accuracy > loss
    answers = planned("task=squad", "method=mezo", "method.objective=f1", tokens=128)
    assert answers.phases["step"] >= answers.phases["answers"]
    assert any("generates an answer" in sentence for sentence in answers.assumptions)


def test_the_moments_of_mezo_adam_are_those_of_a_step() -> None:
    """Held all the time, and on disk with the last whole checkpoint beside the best weights."""
    from smezo_cli.config.build import build

    settings = settings_of(*TINY, "method=mezo_adam")
    model = tiny_model(settings)
    real = build(settings.method, "method", model=model, seed=0, backend="eager", check=False)
    real.step(lambda: model(torch.ones(1, 4, dtype=torch.int64)).logits.square().mean())
    state = sum(t.numel() * t.element_size() for t in real.snapshot()[1].values())
    found = planned("method=mezo_adam", "full_save_every=5")
    assert found.resident["optimizer state"] == state == 8 * WEIGHTS
    assert found.disk == 2 * 4 * WEIGHTS + state
    assert found.disk_peak == 4 * 4 * WEIGHTS + 2 * state


@pytest.mark.parametrize("method", ["sparse_mezo", "adamw"])
def test_micro_batches_need_the_activations_of_their_rows(method: str) -> None:
    """Those of a run whose whole batch has so few rows; gradients stay beside them, though."""
    whole, parts, few = (
        planned(f"method={method}", *words).peak
        for words in (
            ["batch_size=64"],
            ["batch_size=64", "micro_batch_size=2"],
            ["batch_size=2"],
        )
    )
    kept = 4 * WEIGHTS if method == "adamw" else 0
    assert few + kept * 0.8 <= parts <= few + kept
    assert parts < whole

"""Tensor-train adapters: their matrices, where they stand, what is saved, whole runs."""

import copy
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from smezo_cli import train
from smezo_cli.cli import main
from smezo_cli.errors import UserError
from smezo_cli.models.adapter import attach
from smezo_cli.models.tensor_train import Bottleneck, core_shapes, factors, load
from smezo_cli.plan.planner import plan
from smezo_cli.run.method import build_method
from tests.models.test_adapter import MASKED, SMALL, bits, causal, closure, made

pytestmark = pytest.mark.usefixtures("one_thread")

NODE = {"kind": "tensor_train", "bottleneck": 8, "rank": 3, "bias": False}
MODELS = (*("tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-gemma3", "tiny-opt", "tiny-roberta"),)


def filled(module: Bottleneck, seed: int = 0) -> Bottleneck:
    """Give all cores normal numbers, the last one too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return module


def bottlenecks(model: Any) -> dict[str, Bottleneck]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Bottleneck)}


def cores_of(module: Bottleneck, which: str) -> list[Tensor]:
    return [t for name, t in module.tensors().items() if re.fullmatch(rf"{which}_\d+", name)]


def matrix(cores: list[Tensor], rows: int) -> Tensor:
    """A matrix entry by entry, as the definition has it: a product of one slice of each core."""
    sizes = [core.shape[1] for core in cores]
    entries = []
    for index in itertools.product(*map(range, sizes)):  # the last one runs first, as in a matrix
        product = torch.eye(1, dtype=torch.float64)
        for core, i in zip(cores, index, strict=True):
            product = product @ core[:, i].double()
        entries.append(product[0, 0])
    return torch.stack(entries).view(rows, -1)


@pytest.mark.parametrize(("width", "size"), [(12, 8), (30, 4), (7, 3), (6, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_it_computes_what_its_matrices_do(width: int, size: int, bias: bool) -> None:
    """Also of sizes without three factors."""
    module = filled(Bottleneck(width, size, 3, bias))
    y = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))
    down, up = matrix(cores_of(module, "down"), width), matrix(cores_of(module, "up"), size)
    assert (down.shape, up.shape) == ((width, size), (size, width))
    inner, outer = y.double() @ down, torch.zeros(())
    if bias:
        inner = inner + module.get_parameter("down_bias").double()
        outer = module.get_parameter("up_bias").double()
    wanted = y.double() + F.relu(inner) @ up + outer
    # float32 sums of some ten products of six numbers of size 1.
    torch.testing.assert_close(module(y).double(), wanted, rtol=1e-5, atol=1e-5)
    assert module(y.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [*range(1, 130), 576, 640, 768, 896, 960, 1024, 4096, 5120, 8191])
def test_factors_have_the_least_sum(size: int) -> None:
    found = factors(size)
    assert math.prod(found) == size
    assert found == sorted(found)
    least = min(
        a + b + size // a // b
        for a in range(1, size + 1)
        if size % a == 0 and a * a <= size
        for b in range(1, math.isqrt(size // a) + 1)
        if size // a % b == 0
    )
    assert sum(found) + (3 - len(found)) == least


def test_shapes_are_those_of_the_released_code() -> None:
    """For LLaMA-2-7B: 16, 16, 16, 4, 4, 4 down, and the other way round up, of rank 5."""
    shapes = core_shapes(4096, 64, 5)
    assert [n for _, n, _ in shapes] == [16, 16, 16, 4, 4, 4]
    assert [r for _, _, r in shapes] == [5, 5, 5, 5, 5, 1]
    assert [n for _, n, _ in core_shapes(64, 4096, 5)] == [4, 4, 4, 16, 16, 16]
    assert sum(a * n * b for a, n, b in shapes) == 1100
    assert (factors(768), factors(1024)) == ([8, 8, 12], [8, 8, 16])


def test_first_values_have_the_variance_that_is_promised_and_up_is_zero() -> None:
    """Over 40 seeds; means of products of six squares of normals vary by a quarter."""
    squares = []
    for seed in range(40):
        module = Bottleneck(64, 64, 16, False)
        module.set_first_values(seed, "x")
        squares.append(
            module._times("down", torch.eye(64), module.tensors()).detach().square().mean()
        )
        *others, last = cores_of(module, "up")
        assert not last.any()
        assert all(core.all() for core in others)
    found = torch.stack(squares) * (64 + 64)
    assert abs(found.mean() - 1) < 4 * found.std() / 40**0.5 < 0.25
    y = torch.randn(3, 64)
    assert torch.equal(module(y), y)


@pytest.mark.parametrize("model", MODELS)
def test_training_begins_at_the_model_itself_and_moves_the_cores_alone(model: str) -> None:
    plain, job = made("mezo", model), made("adazeta", model, "lr=0.1", "eps=1e-2")
    assert torch.equal(closure(plain)(), closure(job)())
    assert job.fingerprint() == plain.fingerprint()
    found = bottlenecks(job.model)
    assert len(found) == 2 * job.model.config.num_hidden_layers
    trainer, before = build_method(job), bits(job.model)
    trainer.self_check(closure(job))
    for _ in range(3):
        trainer.step(closure(job))
    moved = {n for n, p in job.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trainer.trained.keys()
    width = job.model.config.hidden_size
    cores = sum(a * n * b for w in ((width, 64), (64, width)) for a, n, b in core_shapes(*w, 5))
    assert trainer.num_weights == len(found) * cores
    assert not torch.equal(closure(plain)(), closure(job)())
    with job.as_it_came():
        assert torch.equal(closure(plain)(), closure(job)())


@pytest.mark.parametrize("executor", ["sequential", "lockstep"])
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-opt", "tiny-roberta"])
def test_a_probe_moves_every_core(model: str, executor: str) -> None:
    """At cores that all have an effect: its losses are those of cores that were overwritten."""
    job = made("adazeta", model, "eps=1e-2", f"method.executor={executor}")
    for i, module in enumerate(bottlenecks(job.model).values()):
        filled(module, i)
    trainer: Any = build_method(job)
    trainer.self_check(closure(job))
    plus, minus = trainer.losses_at(closure(job), 0)
    record = trainer.step(closure(job))
    assert record.projected_grad[0] == (plus - minus) / 2e-2
    other = made("adazeta", model, "eps=1e-2")
    for i, module in enumerate(bottlenecks(other.model).values()):
        filled(module, i)
    again: Any = build_method(other)
    mover, losses = again.mover([0], [1e-2]), []
    with torch.no_grad():
        losses.append(float(closure(other)()))
        for name, module in bottlenecks(other.model).items():
            moved = torch.empty_like(module.cores)
            mover.whole(module.cores, moved)
            start = 0
            for own, core in module.tensors().items():  # one by one, each is seen to matter
                core.copy_(moved[start : start + core.numel()].view(core.shape))
                start += core.numel()
                losses.append(float(closure(other)()))
                assert losses[-1] != losses[-2], f"{name}.{own}"
            assert start == len(moved)
    # float32 losses of order 1.
    assert losses[-1] == pytest.approx(plus, rel=1e-5)


def test_a_layer_is_followed_by_its_bottleneck() -> None:
    """Behind attention's output and behind the feed-forward's, before what was there is added."""
    job = made("adazeta")
    layer = job.model.get_submodule("model.layers.0.self_attn.o_proj")
    module = filled(bottlenecks(job.model)["model.layers.0.self_attn.o_proj.bottleneck"])
    x = torch.randn(2, 4, layer.in_features)
    own = F.linear(x, layer.weight)
    torch.testing.assert_close(layer(x), module(own), rtol=1e-5, atol=1e-5)
    assert {name.split(".", 3)[3] for name in bottlenecks(job.model)} == {
        "self_attn.o_proj.bottleneck",
        "mlp.down_proj.bottleneck",
    }
    copied = copy.deepcopy(layer)
    filled(copied.bottleneck, 5)
    assert not torch.equal(copied(x), layer(x))  # a copy calls its own


def test_first_values_follow_from_the_seed_alone() -> None:
    def first(seed: int) -> dict[str, Tensor]:
        job = made("mezo")
        state = torch.get_rng_state()
        attach(job.model, NODE, seed)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(1)
        return bits(job.model)

    one, again, other = first(1), first(1), first(2)
    assert all(torch.equal(one[n], again[n]) for n in one)
    changed = {n for n in one if not torch.equal(one[n], other[n])}
    assert changed == {n for n in one if n.endswith("bottleneck.cores")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_beside_weights_in_low_precision_cores_are_float32(dtype: str) -> None:
    job = made("adazeta", "tiny-llama", f"dtype={dtype}", "lr=0.1")
    trainer = build_method(job)
    assert {p.dtype for p in trainer.trained.values()} == {torch.float32}
    trainer.step(closure(job))
    for module in bottlenecks(job.model).values():  # zeros before
        assert cores_of(module, "up")[-1].any()


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_other_models_are_refused_in_one_sentence(kind: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = causal(kind, **sizes, **({} if kind == "gpt2" else {"intermediate_size": 64}))
    with pytest.raises(UserError, match="kind=tensor_train knows the blocks of Llama") as caught:
        attach(model, NODE, seed=0)
    assert str(caught.value).count(". ") == 0
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "qwen3"])
def test_further_models_of_the_families(kind: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    model = causal(kind, **sizes, num_attention_heads=4, num_key_value_heads=2)
    ids = torch.tensor([[5, 9, 11, 7, 30]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        attach(model, NODE, seed=0)
        assert torch.equal(model(input_ids=ids).logits, before)
        for i, module in enumerate(bottlenecks(model).values()):
            filled(module, i)
        assert not torch.equal(model(input_ids=ids).logits, before)
    assert len(bottlenecks(model)) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("method.adapter.rank=0", "method.adapter.rank must be a whole number of at least 1"),
        ("method.adapter.bottleneck=0", "method.adapter.bottleneck must be a whole number"),
        ("method.adapter.bias=1", "method.adapter.bias must be true or false"),
        ("+method.adapter.r=3", "no method.adapter.r of kind tensor_train"),
        ("method.adapter.kind=tt", "lora, lora_fa, prefix or tensor_train"),
    ],
)
def test_mistakes_are_one_sentence(words: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        made("adazeta", "tiny-llama", *words.split())


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-opt", "tiny-roberta"])
def test_what_is_exported_is_loaded_again(model: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    made("mezo", model).save(base)
    own = [f"model.path={base}", "model.max_length=64", "method.adapter.bias=true"]
    own += ["model.family=masked", *MASKED] if model == "tiny-roberta" else []
    job = made("adazeta", "own", *own)
    for i, module in enumerate(bottlenecks(job.model).values()):
        filled(module, i)
    job.save(tmp_path / "adapter")
    assert "cannot be merged" in job.loaded_by
    size = (tmp_path / "adapter" / "tensor_train.safetensors").stat().st_size
    assert job.saved_bytes < size < job.saved_bytes + 20_000  # names and shapes
    auto: Any = AutoModelForMaskedLM if model == "tiny-roberta" else AutoModelForCausalLM
    again = load(auto.from_pretrained(base), tmp_path / "adapter")
    ids = torch.tensor([[5, 9, 11, 7, 30]])
    with torch.no_grad():
        mine = job.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        theirs = again(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    # Linear layers of a run may be computed by oneDNN, in another order.
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    job = made("adazeta")
    job.save(tmp_path / "adapter")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    other = causal("llama", **sizes, num_attention_heads=4)
    with pytest.raises(UserError, match="holds adapters of another model than LlamaForCausalLM"):
        load(other, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"has no tensor_train.json of smezo"):
        load(other, tmp_path)
    (tmp_path / "adapter" / "tensor_train.safetensors").write_bytes(b"?" * 100)
    with pytest.raises(UserError, match=r"tensor_train.safetensors cannot be read"):
        load(other, tmp_path / "adapter")
    with pytest.raises(UserError, match="holds tensor-train adapters, which stay beside a base"):
        made("mezo", "own", f"model.path={tmp_path / 'adapter'}")


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    """The layers of a Mistral have the names and the widths of a Llama's."""
    made("adazeta").save(tmp_path / "adapter")
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
    other = causal("mistral", **sizes, num_attention_heads=4)
    said = "of type llama, and MistralForCausalLM is of type mistral: give the base model"
    with pytest.raises(UserError, match=said):
        load(other, tmp_path / "adapter")
    assert not bottlenecks(other)


def test_a_plan_counts_the_cores(tmp_path: Path) -> None:
    settings = made("adazeta", "tiny-llama", "eval_every=2").settings
    alone = made("mezo", "tiny-llama", "eval_every=2").settings
    found, without = (plan(s, capacity=10**9, tokens=32) for s in (settings, alone))
    cores = sum(a * n * b for w in ((32, 64), (64, 32)) for a, n, b in core_shapes(*w, 5))
    layers = made("mezo").model.config.num_hidden_layers
    assert found.resident["weights"] - without.resident["weights"] == 4 * 2 * layers * cores


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-roberta"])
def test_a_run_is_kept_scored_resumed_and_replayed(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With more queries from step to step: 1, 1, 3, 6 of the 15."""
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, f"model={model}", "method=adazeta", "batch_size=4", "eval_every=2", "lr=0.05"]
    words += ["method.schedule_steps=6", "method.num_epochs=6", "lr_schedule=constant"]
    words += MASKED if model == "tiny-roberta" else []
    assert train.main([*words, "steps=3"]) == 0
    assert train.main([*words, "steps=4"]) == 0
    (run,) = Path("runs/default").iterdir()
    result = json.loads((run / "result.json").read_text())
    rate = math.log(20 / 0.85) / math.log(6)
    queries = [min(max(int(0.85 * e**rate), 1), 15) for e in range(4)]
    assert result["status"] == "done"
    assert result["num_forwards"] == 2 * sum(queries)
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    assert f"test accuracy {result['test']['accuracy']:.4f}" in capsys.readouterr().out
    assert main(["eval", str(run), "--base", "--out", "base.jsonl"]) == 0
    assert f"test accuracy {result['zero_shot']['accuracy']:.4f}" in capsys.readouterr().out
    assert main(["replay", str(run), "--out", "saved"]) == 0
    assert "NOT" not in capsys.readouterr().out
    assert main(["export", str(run), "my.delta", "--delta"]) == 0
    assert main(["replay", "my.delta", "--split", "none"]) == 0
    assert main(["export", str(run), "exported"]) == 0
    assert "a bottleneck has a nonlinearity and cannot be merged" in capsys.readouterr().out
    assert main(["export", str(run), "alone", "--adapter"]) == 2
    assert "peft has no adapters of tensor-train cores" in capsys.readouterr().err
    assert not Path("alone").exists()

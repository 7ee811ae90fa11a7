"""LoRA and prefixes: what is trained, that peft computes the same, and whole runs with them."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from smezo_cli import train
from smezo_cli.cli import main
from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.models.adapter import attach
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.method import build_method
from smezo_cli.scoring import prefix_cache
from smezo_cli.scoring.candidates import Candidates
from tests.composed import settings_of

METHODS = ("lora", "mezo_lora", "sparse_mezo_lora", "prefix", "mezo_prefix")
SMALL = ["task=toy", "task.num_train=16", "task.num_dev=8", "task.num_test=8", "device=cpu"]
LORA = {"kind": "lora", "r": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj", "query", "value"]}
PREFIX = {"kind": "prefix", "num_tokens": 3}
MASKED = ["task.prompt='{text}. It was {mask} .'", "task.labels=[terrible,great]"]

pytestmark = pytest.mark.usefixtures("one_thread")


def made(method: str, model: str = "tiny-llama", *words: str) -> Loaded:
    prompt = MASKED if model == "tiny-roberta" else []
    words = (*SMALL, f"model={model}", f"method={method}", "steps=4", *prompt, *words)
    settings = settings_of(*words)
    return Loaded(settings, "cpu", lambda line: None)


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def closure(job: Loaded) -> Any:
    rows = job.encode(job.task.train, job.prompts[0])[:4]
    return lambda: job.scorer.loss(rows)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["tiny-mistral", "tiny-opt", "tiny-roberta"])
def test_only_the_adapter_is_trained(model: str, method: str) -> None:
    job = made(method, model, "lr=0.1")
    trainer, before = build_method(job), bits(job.model)
    trainer.self_check(closure(job))
    for _ in range(3):
        trainer.step(closure(job))
    moved = {n for n, p in job.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trainer.trained.keys()
    assert all("lora_" in name or name.startswith("prefix_encoder") for name in moved)


def test_a_sparse_mask_trains_all_of_b_which_begins_as_zeros() -> None:
    job = made("sparse_mezo_lora", "tiny-llama", "lr=0.1", "sparsity=0.75")
    trainer, before = build_method(job), bits(job.model)
    for _ in range(2):
        trainer.step(closure(job))
    for name, p in trainer.trained.items():
        share = float((p != before[name]).float().mean())
        assert share > 0.99 if "lora_B" in name else 0.2 < share < 0.3


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-roberta"])
@pytest.mark.parametrize("node", [LORA, PREFIX], ids=["lora", "prefix"])
def test_first_values_follow_from_the_seed_alone(node: dict[str, Any], model: str) -> None:
    def first(seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        job = made("mezo", model)
        state = torch.get_rng_state()
        attach(job.model, node, seed)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(1)  # the global generator has no say
        return bits(job.model), torch.get_rng_state()

    (one, _), (again, _), (other, _) = first(1), first(1), first(2)
    assert all(torch.equal(one[n], again[n]) for n in one)
    changed = {n for n in one if not torch.equal(one[n], other[n])}
    assert changed == {n for n in one if "lora_A" in n or "prefix_encoder" in n}


def test_lora_begins_at_the_model_itself() -> None:
    plain, job = made("mezo"), made("mezo_lora")
    assert torch.equal(closure(plain)(), closure(job)())
    a = next(p for n, p in job.model.named_parameters() if "lora_A" in n)
    bound = a.shape[1] ** -0.5
    assert 0.9 * bound < float(a.detach().abs().max()) <= bound
    assert job.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-roberta"])
def test_off_the_model_computes_as_it_came(model: str) -> None:
    plain, job = made("mezo", model), made("mezo_prefix", model)
    with job.as_it_came():
        assert torch.equal(closure(plain)(), closure(job)())
    assert not torch.equal(closure(plain)(), closure(job)())


# peft 0.21 asks for a name that transformers 5 gives up.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-opt"])
def test_peft_computes_the_same_from_what_is_exported(model: str, tmp_path: Path) -> None:
    """An independent reference, by a forward that is not ours."""
    ids = torch.tensor([[5, 9, 11, 7, 30]])
    base = tmp_path / "base"
    made("mezo", model).save(base)
    for method in ("mezo_lora", "mezo_prefix"):
        job = made(method, "own", f"model.path={base}", "model.max_length=64", "lr=0.05")
        trainer = build_method(job)
        trainer.step(closure(job))
        with torch.no_grad():
            mine = job.model(input_ids=ids, use_cache=False).logits
        folder = tmp_path / method
        job.save(folder)
        auto = AutoModelForCausalLM if method == "mezo_lora" else AutoPeftModelForCausalLM
        theirs = auto.from_pretrained(folder).eval()
        with torch.no_grad():
            logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        # B A is added before or behind the product: float32 rounding of logits of order 1.
        torch.testing.assert_close(mine, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_peft_computes_the_same_of_a_masked_model(attention: str, tmp_path: Path) -> None:
    """Of one row: of several it would see their padding, which the next test is about."""
    base = tmp_path / "base"
    made("mezo", "tiny-roberta").save(base)
    own = (f"model.path={base}", "model.family=masked", "model.max_length=64", "lr=0.05")
    job = made("mezo_prefix", "own", *own, f"model.attention={attention}", *MASKED)
    trainer = build_method(job)
    trainer.step(closure(job))
    job.save(tmp_path / "prefix")
    model: Any = AutoModelForMaskedLM.from_pretrained(base)
    theirs: Any = PeftModel.from_pretrained(model, tmp_path / "prefix").eval()
    ids = torch.tensor([[5, 9, 11, 7, 30]])
    with torch.no_grad():
        mine = job.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        with job.as_it_came():
            before = job.model(input_ids=ids).logits
    torch.testing.assert_close(mine, logits, atol=1e-5, rtol=1e-5)
    assert float((mine - before).abs().max()) > 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["roberta", "bert", "electra"])
def test_behind_a_prefix_a_masked_model_does_not_see_padding(kind: str, attention: str) -> None:
    model = masked(kind, attention)
    attach(model, PREFIX, seed=0)
    ids = torch.tensor([[5, 9, 11, 0, 0], [5, 9, 11, 3, 4]])
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=(ids > 0).long()).logits
        alone = model(input_ids=ids[:1, :3]).logits
    # Sums of a handful of float32 numbers of order 1, in another order.
    torch.testing.assert_close(both[:1, :3], alone, atol=1e-5, rtol=1e-5)


def masked(kind: str, attention: str = "sdpa") -> Any:
    """A masked model of another make than the tiny ones, with random weights."""
    numbers = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "pad_token_id": 0}
    numbers |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40}
    config = AutoConfig.for_model(kind, **numbers)
    model: Any = AutoModelForMaskedLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=p.shape[-1] ** -0.5, generator=generator)
    return model.eval()


@contextlib.contextmanager
def no_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(prefix_cache, "cache_that_saves", lambda *_: None)
        yield


def test_a_prefix_is_seen_through_the_cache_of_a_common_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scores behind a cached context are those of whole sequences, at several lengths."""
    job = made("mezo_prefix")
    rows = [
        Candidates(((*range(5, n), 40, 41), (*range(5, n), 50)), (2, 1), 0, False)
        for n in (150, 200)
    ]
    with torch.inference_mode():
        assert prefix_cache.cache_that_saves(job.scorer.forward, rows) is not None
        fast = job.scorer.scores(rows)
        with no_cache(monkeypatch):
            slow = job.scorer.scores(rows)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_the_adapter_must_fit_the_model() -> None:
    with pytest.raises(UserError, match=r"method.adapter.targets=\['nothing'\] do not fit"):
        made("mezo_lora", "tiny-llama", "method.adapter.targets=[nothing]")
    with pytest.raises(UserError, match="kind=prefix needs the keys and values"):
        attach(masked("distilbert"), PREFIX, seed=0)
    model = masked("bert")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"model\.attention=flash_attention_2 takes no mask"):
        attach(model, PREFIX, seed=0)
    assert all(p.requires_grad for p in model.parameters())


def causal(kind: str, **numbers: Any) -> Any:
    """A causal model of another make than the tiny ones, with random weights."""
    common = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **numbers))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=p.shape[-1] ** -0.5, generator=generator)
    return model.eval()


WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


@pytest.mark.parametrize(
    ("kind", "numbers", "own"),
    [
        ("phi3", WIDE, "[o_proj,qkv_proj,gate_up_proj,down_proj]"),
        ("gpt_neox", WIDE, "[query_key_value,dense,dense_h_to_4h,dense_4h_to_h]"),
        ("gpt2", GPT2, "[c_attn,c_proj,c_fc]"),
    ],
)
def test_targets_that_fail_are_answered_with_the_models_own(
    kind: str, numbers: dict[str, Any], own: str
) -> None:
    """And those go: also of GPT-2, whose layers hold their weights the other way round."""
    numbers = {k: v for k, v in numbers.items() if kind != "gpt_neox" or "key_value" not in k}
    model = causal(kind, **numbers)
    with pytest.raises(UserError, match="has no layer of such a name") as caught:
        attach(model, LORA, seed=0)
    assert str(caught.value).endswith(f"of which it has method.adapter.targets={own}.")
    attach(model, LORA | {"targets": own.strip("[]").split(",")}, seed=0)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 2 * (
        len(own.split(",")) + (kind == "gpt2")  # c_proj of attention and of the other half
    )


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("embed_tokens", "model.embed_tokens is no linear layer but of class Embedding"),
        ("input_layernorm", "is no linear layer but of class LlamaRMSNorm"),
        ("lm_head", "the weight of lm_head is that of another layer, too"),
    ],
)
def test_layers_that_lora_cannot_be_added_to_are_one_sentence(target: str, why: str) -> None:
    model = causal("llama", **WIDE, tie_word_embeddings=True)
    with pytest.raises(UserError, match=why) as caught:
        attach(model, LORA | {"targets": [target]}, seed=0)
    assert "method.adapter.targets=[q_proj,k_proj,v_proj" in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())


def test_lora_on_gpt2_is_exported_as_it_computes(tmp_path: Path) -> None:
    model = causal("gpt2", **GPT2)
    adapter = attach(model, LORA | {"targets": ["c_attn"]}, seed=0)
    ids = torch.tensor([[5, 9, 11, 7, 30]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
        mine = model(input_ids=ids).logits
        adapter.save(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()(input_ids=ids)
    assert float((mine - before).abs().max()) > 0.1
    torch.testing.assert_close(again.logits, mine, atol=1e-4, rtol=1e-4)


HYBRID = {
    "lfm2": WIDE | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "jamba": WIDE
    | {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"mamba_d_state": 8, "mamba_dt_rank": 4},
}


@pytest.mark.parametrize("kind", HYBRID)
def test_a_prefix_is_refused_where_layers_hold_a_state(kind: str) -> None:
    """Their caches have keys and values of some layers alone."""
    with pytest.raises(UserError, match="kind=prefix needs the keys and values"):
        attach(causal(kind, **HYBRID[kind]), PREFIX, seed=0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("method=mezo_lora method.adapter.r=0", "method.adapter.r must be a whole number"),
        ("method=mezo_lora method.adapter.targets=[]", "at least one"),
        ("method=mezo_lora method.adapter=null", "such as method=mezo"),
        ("method=mezo_lora +method.adapter.rank=3", "no method.adapter.rank of kind lora"),
        ("method=mezo_prefix method.adapter.kind=prompt", "lora, lora_fa, prefix or tensor_train"),
    ],
)
def test_mistakes_are_one_sentence(words: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(compose([*SMALL, "model=tiny-llama", *words.split()]))


@pytest.mark.parametrize(
    ("method", "model"),
    [
        ("lora", "tiny-llama"),
        ("sparse_mezo_lora", "tiny-llama"),
        ("mezo_prefix", "tiny-llama"),
        ("prefix", "tiny-roberta"),
        ("mezo_prefix", "tiny-roberta"),
    ],
)
def test_a_run_is_kept_scored_and_replayed(
    method: str,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, f"model={model}", f"method={method}", "steps=4", "batch_size=4"]
    words += MASKED if model == "tiny-roberta" else []
    assert train.main([*words, "eval_every=2", "lr=0.05"]) == 0
    (run,) = Path("runs/default").iterdir()
    result = json.loads((run / "result.json").read_text())
    trained = result["num_trained"]
    assert trained < 5000
    assert result["status"] == "done"
    # The adapter alone is saved (float32; an optimizer has as much again, twice).
    sizes = [f.stat().st_size for f in (run / "checkpoint").rglob("*.safetensors")]
    assert max(sizes) < 3 * 4 * trained + 8000
    assert main(["eval", str(run)]) == 0
    assert f"test accuracy {result['test']['accuracy']:.4f}" in capsys.readouterr().out
    assert main(["eval", str(run), "--base", "--out", "base.jsonl"]) == 0
    assert f"test accuracy {result['zero_shot']['accuracy']:.4f}" in capsys.readouterr().out
    if "mezo" in method:
        assert main(["replay", str(run), "--out", "saved"]) == 0
        assert "NOT" not in capsys.readouterr().out
    assert main(["export", str(run), "exported"]) == 0
    what = "peft loads it" if "prefix" in method else "transformers loads it"
    assert what in capsys.readouterr().out

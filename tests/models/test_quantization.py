"""model.quantization: refusals, what transformers is asked for, the plan. No GPU has run it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from smezo_cli.config.compose import compose
from smezo_cli.config.digest import digest
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.models import architecture
from smezo_cli.models.adapter import attach
from smezo_cli.models.load import load_model
from smezo_cli.plan.planner import plan
from smezo_cli.run import loaded
from smezo_cli.run.loaded import Loaded

LINE = ["task=toy", "model=opt-125m", "method=mezo_lora"]
QUANTIZED = [*LINE, "+model.quantization=4bit"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("method=mezo", "stays frozen beside LoRA, and method is mezo"),
        ("method=mezo_prefix", "choose method=lora, mezo_lora or sparse_mezo_lora"),
        ("device=cpu", "needs CUDA, and device=cpu"),
        ("model=tiny-llama", "model=tiny-llama is random"),
        ("model=own model.path=some.gguf", "model=own is a GGUF file"),
        ("+model.quantization=8bit", "model.quantization must be 4bit or null"),
    ],
)
def test_where_it_cannot_be_had_one_sentence_says_so(words: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(compose([*(LINE if "8bit" in words else QUANTIZED), *words.split()]))


def test_nothing_is_loaded_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "load_task", lambda *_, **__: pytest.fail("data were loaded"))
    monkeypatch.setattr(loaded, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    settings = check(compose(QUANTIZED))
    with pytest.raises(UserError, match="needs CUDA, and the device is cpu"):
        Loaded(settings, "cpu", lambda line: None)
    monkeypatch.setattr(architecture, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match="pip install -U bitsandbytes"):
        Loaded(settings, "cuda", lambda line: None)


def test_runs_without_it_keep_their_digest() -> None:
    without = digest(compose(LINE))
    assert digest(compose([*LINE, "+model.quantization=null"])) == without
    assert digest(compose(QUANTIZED)) != without


@pytest.mark.parametrize(("compute", "expected"), [("bfloat16", torch.bfloat16), (None, None)])
def test_what_transformers_is_asked_for(
    compute: str | None, expected: torch.dtype | None, tmp_path: Path, monkeypatch: Any
) -> None:
    """A model that comes back is left where it is: without CUDA a move would fail here."""
    base = check(compose(["task=toy", "model=tiny-llama", "method=mezo", "device=cpu"]))
    Loaded(base, "cpu", lambda line: None, with_rows=False).save(tmp_path / "base")
    words = ["model=own", f"model.path={tmp_path / 'base'}", "model.max_length=64"]
    settings = check(compose([*QUANTIZED, *words]))
    asked: dict[str, Any] = {}
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(where: Any, **given: Any) -> Any:
        asked.update(given)
        return load(where, dtype=given["dtype"])

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(architecture, "is_bitsandbytes_available", lambda: True)
    model, _ = load_model(
        settings.model,
        dtype=torch.float16,
        device=torch.device("cuda:0"),
        cache=tmp_path,
        compute_dtype=getattr(torch, compute) if compute else None,
    )
    assert not model.training
    assert asked["device_map"] == {"": "cuda:0"}
    assert asked["dtype"] == torch.float16
    config = asked["quantization_config"]
    assert (config.load_in_4bit, config.load_in_8bit) == (True, False)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == (expected or torch.float16)


# peft 0.21 asks for a name that transformers 5 gives up.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_beside_packed_weights_lora_is_saved_alone(tmp_path: Path) -> None:
    """The model only says that it is packed: peft's own forward is the reference."""
    settings = check(compose(["task=toy", "model=tiny-llama", "method=mezo", "device=cpu"]))
    job = Loaded(settings, "cpu", lambda line: None, with_rows=False)
    job.save(tmp_path / "base")
    model: Any = job.model
    model.is_loaded_in_4bit = True
    node = {"kind": "lora", "r": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"]}
    adapter = attach(model, node, seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    adapter.save(tmp_path / "adapter")
    assert "PeftModel.from_pretrained(LlamaForCausalLM" in adapter.loaded_by
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert adapter.saved_bytes <= size < 2 * adapter.saved_bytes + 2000
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs: Any = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 9, 11, 7]])
    with torch.no_grad():
        mine, other = model(input_ids=ids).logits, theirs(input_ids=ids).logits
        with adapter.off():
            before = model(input_ids=ids).logits
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mine, before, atol=1e-2)


def test_a_plan_counts_half_a_byte_and_the_scales() -> None:
    words = ["device=cuda", "dtype=float16"]
    whole, packed = (
        plan(check(compose([*line, *words])), capacity=80 * 10**9, tokens=16)
        for line in (LINE, QUANTIZED)
    )
    # Of 12 layers the four projections of attention and the two of the other half.
    linear = 12 * (4 * 768**2 + 2 * 768 * 3072)
    scales = linear // 64 + 4 * linear // (64 * 256)
    assert whole.resident["weights"] - packed.resident["weights"] == 2 * linear - (
        linear // 2 + scales
    )
    # One weight at a time is unpacked.
    assert packed.phases["evaluation"] - whole.phases["evaluation"] == 2 * 768 * 3072
    with pytest.raises(UserError, match="plan it with device=cuda --memory SIZE"):
        plan(check(compose([*QUANTIZED, "device=auto"])), capacity=10**9, tokens=16)

"""Parts for images or sound, which no text reads, are frozen; what a text may read is not."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from smezo_cli import train
from smezo_cli.config.compose import checked_settings, compose
from smezo_cli.methods.mezo import MeZO
from smezo_cli.models.modalities import freeze_unread
from smezo_cli.models.tiny import byte_tokenizer
from smezo_cli.plan.planner import plan

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2},
}


def seeing(vocabulary: int = 37) -> nn.Module:
    sizes = SMALL | {"vocab_size": vocabulary + 3}
    text = sizes | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
    vision = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=vocabulary,
        boi_token_index=vocabulary + 1,
        eoi_token_index=vocabulary + 2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma3ForConditionalGeneration(config)


def test_a_vision_tower_is_frozen_and_a_step_leaves_it_as_it_was() -> None:
    model = seeing()
    before = {name: p.clone() for name, p in model.named_parameters()}
    was_training = model.training
    assert freeze_unread(model) == ["model.vision_tower", "model.multi_modal_projector"]
    assert model.training == was_training
    model.eval()
    opt = MeZO(model, lr=1e-2, eps=1e-3, backend="eager")
    ids = torch.tensor([[3, 4, 5, 6]])
    opt.step(lambda: model(input_ids=ids, labels=ids).loss)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, _ in model.named_parameters() if "language_model" in name}
    assert moved == set(opt.trained)


def test_a_run_says_and_records_what_it_froze(tmp_path: Path) -> None:
    """A glob for the same parts is not refused, though nothing is left for it to freeze."""
    model, folder = seeing(332), tmp_path / "saved"
    model.save_pretrained(folder)
    byte_tokenizer(add_bos=False).save_pretrained(folder)
    few = ["task.num_train=8", "task.num_dev=4", "task.num_test=4", "task.prompt=0", "lr=1e-4"]
    own = ["model=own", f"model.path={folder}", "model.name=seeing", "model.max_length=128"]
    words = ["task=toy", *own, *few, "method=mezo", 'method.freeze=["*vision_tower*","*norm*"]']
    short = ["steps=1", "batch_size=4", "eval_every=1", "device=cpu", f"runs_dir={tmp_path}"]
    result = train.run(compose([*words, *short]))
    assert result["frozen_unread"] == ["model.vision_tower", "model.multi_modal_projector"]
    (console,) = tmp_path.rglob("console.log")
    assert "  frozen  model.vision_tower, model.multi_modal_projector: text never" in (
        console.read_text()
    )
    trained = [p for n, p in model.named_parameters() if "language" in n and "norm" not in n]
    assert result["num_trained"] == sum(p.numel() for p in trained)


def test_a_plan_counts_what_is_frozen_as_weights_alone(tmp_path: Path) -> None:
    model, folder = seeing(332), tmp_path / "saved"
    model.save_pretrained(folder)
    own = ["model=own", f"model.path={folder}", "model.name=seeing", "model.max_length=128"]
    freeze = 'method.freeze=["*vision_tower*"]'  # of nothing else
    words = ["task=toy", *own, "method=mezo_adam", freeze, "lr=1e-4", "device=cpu"]
    planned = plan(checked_settings(words, None, lambda line: None))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = sum(size for name, size in sizes.items() if "language_model" in name)
    assert planned.resident["weights"] == 4 * sum(sizes.values())
    assert planned.resident["optimizer state"] == 8 * trained < 4 * sum(sizes.values())


def test_a_projector_that_the_text_goes_through_is_trained() -> None:
    """Not by its name: what a forward over a text reads outside of the decoder stays."""
    model = seeing()
    projector = model.model.multi_modal_projector
    inner = model.model.language_model.forward

    def forward(*args: object, **kwargs: object) -> object:
        out = inner(*args, **kwargs)
        out.last_hidden_state = projector.mm_soft_emb_norm(out.last_hidden_state)
        return out

    model.model.language_model.forward = forward
    frozen = freeze_unread(model)
    assert "model.vision_tower" in frozen
    assert projector.mm_soft_emb_norm.weight.requires_grad
    assert not projector.mm_input_projection_weight.requires_grad
    assert "model.multi_modal_projector.mm_input_projection_weight" in frozen


@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
        lambda: MixtralForCausalLM(
            MixtralConfig(num_local_experts=8, num_experts_per_tok=1, **SMALL)
        ),
    ],
    ids=["llama", "experts"],
)
def test_nothing_of_a_model_of_text_is_frozen(make: object) -> None:
    """An expert that a text is not sent to may be needed by the next."""
    with torch.random.fork_rng(devices=[]):
        model = make()
    assert freeze_unread(model) == []
    assert all(p.requires_grad for p in model.parameters())

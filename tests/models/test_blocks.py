"""Which block of a model is the first that something is trained in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from smezo_cli.models.adapter import attach
from smezo_cli.models.blocks import Blocks, blocks_of
from smezo_cli.models.load import load_model
from smezo_cli.zo.targets import select
from tests import CONF

FAMILIES = ["tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-gemma3", "tiny-opt", "tiny-roberta"]


def tiny(name: str, **changes: Any) -> Any:
    cfg = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"), resolve=True)
    assert isinstance(cfg, dict)
    cfg["config"] |= changes
    node = {str(key): value for key, value in cfg.items()}
    place = {"device": torch.device("cpu"), "cache": Path("/nowhere")}
    model, _ = load_model(node, dtype=torch.float32, **place)
    return model


def known(model: nn.Module) -> Blocks:
    found = blocks_of(model)
    assert found is not None
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_says_where_a_forward_may_begin(name: str) -> None:
    """Of each tensor alone: its block; 0 if it is read before; behind the last, else."""
    model = tiny(name)
    blocks = known(model)
    assert len(blocks.modules) == 2
    for full, parameter in model.named_parameters():
        inside = [k for k in range(2) if full.startswith(f"{blocks.path}.{k}.")]
        is_before = "embed" in full and "project_out" not in full
        wanted = inside[0] if inside else 0 if is_before else 2
        assert blocks.first_trained([parameter]) == wanted, full
    assert blocks.first_trained([]) == 2
    assert blocks.first_trained(blocks.modules[1].parameters()) == 1
    assert blocks.first_trained(model.parameters()) == 0


@pytest.mark.parametrize(("is_tied", "first"), [(True, 0), (False, 2)])
def test_a_tied_output_layer_is_read_before_the_blocks(is_tied: bool, first: int) -> None:
    model = tiny("tiny-llama", tie_word_embeddings=is_tied)
    assert known(model).first_trained([model.get_output_embeddings().weight]) == first


def test_a_tensor_from_elsewhere_is_taken_to_be_read_first() -> None:
    """An adapter may have its tensors anywhere: nothing is skipped that nobody knows of."""
    model = tiny("tiny-llama")
    assert known(model).first_trained([nn.Parameter(torch.zeros(1))]) == 0
    model.beside = nn.Linear(2, 2)
    assert known(model).first_trained(model.beside.parameters()) == 0


def test_matrices_of_lora_lie_in_the_blocks_whose_layers_they_are_beside() -> None:
    model = tiny("tiny-llama")
    node = {"kind": "lora", "r": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}
    attach(model, node, seed=0)
    blocks, trained = known(model), [p for p in model.parameters() if p.requires_grad]
    assert blocks.first_trained(trained) == 0
    behind = [t.parameter for t in select(model, blocks.globs(1), [])]
    assert 0 < len(behind) < len(trained)
    assert blocks.first_trained(behind) == 1


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 12, 20, 21, 22, 60, 94, 99])
def test_globs_match_what_the_first_blocks_have_and_no_other(count: int) -> None:
    model = nn.Module()
    for k in range(120):
        model.register_module(f"{k}", nn.Linear(1, 1, bias=False))
    whole = nn.ModuleDict({"a": nn.ModuleDict({"layers": model})})
    globs = Blocks("a.layers", whole, (), frozenset()).globs(count)
    left = {target.name for target in select(whole, globs, [])}
    assert left == {f"a.layers.{k}.weight" for k in range(count, 120)}


@pytest.mark.parametrize("model_type", ["bloom", "gpt2"])
def test_models_of_another_make_have_no_blocks_that_are_known(model_type: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type))
    assert blocks_of(model) is None
    assert blocks_of(nn.Linear(2, 2)) is None


def test_a_class_that_is_not_of_transformers_is_not_taken_for_what_its_config_says() -> None:
    model = tiny("tiny-llama")
    model.__class__ = type("LlamaForCausalLM", (type(model),), {"__module__": "elsewhere"})
    assert blocks_of(model) is None

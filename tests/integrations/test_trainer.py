"""A Trainer makes the steps of smezo's methods, with real runs of transformers' Trainer."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)

from smezo_cli.integrations.trainer import ZeroOrderMixin, ZeroOrderTrainer
from smezo_cli.methods.addax import Addax
from smezo_cli.methods.grzo import GRZO
from smezo_cli.methods.lozo import LOZO
from smezo_cli.methods.mezo import MeZO
from smezo_cli.methods.mezo_adam import MeZOAdam
from smezo_cli.methods.qzo import QZO
from smezo_cli.methods.senszoq import SensZOQ
from smezo_cli.methods.sparse_mezo import SparseMeZO
from smezo_cli.models.tiny import byte_tokenizer
from smezo_cli.zo.optimizer import ZeroOrder
from tests import ROOT
from tests.zo.test_optimizer import seeded

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [
    {"input_ids": ids, "labels": ids}
    for ids in torch.randint(0, 64, (16, 6), generator=seeded(0)).tolist()
]


def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        attention_dropout=0.5,  # so that a loss in train mode would be random
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


class Spied(ZeroOrderTrainer):
    """Keeps the micro-batches that it is given."""

    def training_step(self, model: nn.Module, inputs: Any, *rest: Any) -> torch.Tensor:
        self.__dict__.setdefault("batches", []).append(inputs)
        return super().training_step(model, inputs, *rest)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    given = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **given | more)


def trained(
    folder: Path,
    method: type[ZeroOrder] = SparseMeZO,
    model: nn.Module | None = None,
    resume: str | None = None,
    callbacks: Any = (),
    method_arguments: Any = None,
    compute_loss_func: Any = None,
    **more: Any,
) -> Spied:
    own = {"eps": 1e-3, "check": False} | ({"sparsity": 0.5} if method is SparseMeZO else {})
    trainer = Spied(
        model=tiny() if model is None else model,
        args=arguments(folder, **more),
        train_dataset=ROWS,
        eval_dataset=ROWS[:4],
        callbacks=list(callbacks),
        compute_loss_func=compute_loss_func,
        method=method,
        method_arguments=own if method_arguments is None else method_arguments,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Batches(TrainerCallback):
    """Keeps the lr of every step as the Trainer logs it."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if "loss" in logs:
            self.logs.append(dict(logs))


def usual(model: Any, batch: Any, tokens: int) -> torch.Tensor:
    """The loss that the model itself computes of a micro-batch."""
    loss: torch.Tensor = model(**batch, num_items_in_batch=tokens).loss
    return loss


def own_loop(
    batches: list[Any], method: type[ZeroOrder], micro: int, loss_of: Any = usual
) -> tuple[Any, Any]:
    """smezo's own loop over some micro-batches: its weights, and the loss of each step."""
    model = tiny().eval()
    own = {"sparsity": 0.5} if method is SparseMeZO else {}
    opt = method(model, lr=1e-3, seed=3, eps=1e-3, check=False, **own)  # type: ignore[arg-type]  # mixed
    losses = []
    for step in range(6):
        opt.set_lr_factor((6 - step) / 6)
        now = batches[step * micro : (step + 1) * micro]
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in now)

        def loss(now: Any = now, tokens: int = tokens) -> torch.Tensor:
            parts = [loss_of(model, batch, tokens) for batch in now]
            return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

        losses.append(opt.step(loss).loss)
    return weights_of(model), losses


def assert_same(weights: dict[str, torch.Tensor], trainer: ZeroOrderTrainer) -> None:
    found = weights_of(trainer.model)
    assert weights.keys() == found.keys()
    assert all(torch.equal(weights[name], found[name]) for name in weights)
    assert any(not torch.equal(p, found[name]) for name, p in weights_of(tiny()).items())


@pytest.mark.parametrize("method", [SparseMeZO, MeZOAdam, LOZO], ids=lambda cls: cls.__name__)
def test_losses_and_weights_are_those_of_the_own_loop(
    method: type[ZeroOrder], tmp_path: Path
) -> None:
    """To the last bit: the same batches, a falling lr, dropout off."""
    seen = Batches()
    found = trained(tmp_path, method, callbacks=[seen])
    weights, losses = own_loop(found.batches, method, 1)
    assert [log["loss"] for log in seen.logs] == pytest.approx(losses, rel=1e-6)  # of float32
    assert_same(weights, found)


def test_micro_batches_are_parts_of_one_loss(tmp_path: Path) -> None:
    """Two of two rows make the step of their sum, over the tokens of both."""
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    found = trained(tmp_path, **more)
    assert_same(own_loop(found.batches, SparseMeZO, 2)[0], found)
    assert found.state.global_step == 6


def smoothed(logits: torch.Tensor, labels: torch.Tensor, tokens: Any) -> torch.Tensor:
    """The mean cross-entropy with a tenth of each label spread over the vocabulary, by torch."""
    flat, right = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(flat, right, reduction="sum", label_smoothing=0.1) / tokens


@pytest.mark.parametrize("way", ["label_smoothing_factor", "compute_loss_func"])
def test_every_loss_of_a_step_has_the_labels(way: str, tmp_path: Path) -> None:
    """Such losses take them out of their inputs, and each micro-batch of a step has two losses."""

    def own(outputs: Any, labels: Any, num_items_in_batch: Any) -> torch.Tensor:
        return smoothed(outputs.logits, labels, num_items_in_batch)

    def loss_of(model: Any, batch: Any, tokens: int) -> torch.Tensor:
        return smoothed(model(input_ids=batch["input_ids"]).logits, batch["labels"], tokens)

    seen = Batches()
    more: dict[str, Any] = {way: 0.1 if way == "label_smoothing_factor" else own}
    more |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    found = trained(tmp_path, MeZO, callbacks=[seen], **more)
    assert all("labels" in batch for batch in found.batches)
    _, losses = own_loop(found.batches, MeZO, 2, loss_of)
    # Sums of float32 in another order, whose noise moves the weights of the later steps.
    assert [log["loss"] for log in seen.logs] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("method", [MeZO, MeZOAdam], ids=lambda cls: cls.__name__)
def test_a_run_goes_on_from_a_checkpoint_of_the_trainer(
    method: type[ZeroOrder], tmp_path: Path
) -> None:
    whole = trained(tmp_path / "whole", method, save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "whole/checkpoint-3"
    assert (checkpoint / "optimizer.pt").is_file()
    again = trained(tmp_path / "again", method, resume=str(checkpoint))
    assert_same(weights_of(whole.model), again)
    assert again.method.num_steps == 6


# peft asks by a name that transformers 5 has given up.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_lora_of_peft_is_trained_alone_and_evaluate_works(tmp_path: Path) -> None:
    base = tiny()
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    found = trained(tmp_path, MeZO, model=model)
    moved = {n for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n}
    assert moved
    assert all(model.get_parameter(name).abs().max() > 0 for name in moved)  # B begins at 0
    for name, p in base.named_parameters():
        if "lora" not in name:
            assert torch.equal(p, before[name.replace(".base_layer", "")])
    assert found.evaluate()["eval_loss"] > 0


def test_the_log_has_the_projected_gradient_and_no_norm(tmp_path: Path) -> None:
    seen = Batches()
    found = trained(tmp_path, callbacks=[seen])
    assert found.record is not None
    assert seen.logs[-1]["projected_grad"] == found.record.projected_grad[0]
    assert all(log.get("grad_norm") is None for log in seen.logs)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"max_grad_norm": 0.5}, "max_grad_norm=0.5 has no effect.*clip_projected_grad"),
        ({"adam_beta1": 0.5}, "adam_beta1=0.5 has no effect.*betas"),
        ({"optim": "sgd"}, "optim=.*the method is the optimizer"),
        ({"method": Addax}, "method=Addax needs other losses than that of the batch"),
        ({"method": SensZOQ}, "method=SensZOQ needs a mask"),
        ({"method": GRZO}, "method=GRZO needs the loss of each row"),
        ({"method": QZO}, "method=QZO makes integers of the weights"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 has no effect"),
        ({"method": torch.optim.SGD}, "must be a class of smezo_cli.methods"),
        ({"method_arguments": {"eps": 1e-3, "lr": 1.0}}, r"TrainingArguments\(learning_rate"),
    ],
    ids=str,
)
def test_what_would_have_no_effect_is_refused(
    more: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        trained(tmp_path, **more)


def test_an_optimizer_beside_the_method_is_refused(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="leave it out"):
        ZeroOrderTrainer(
            model=model,
            args=arguments(tmp_path),
            train_dataset=copy.copy(ROWS),
            optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
            method=MeZO,
            method_arguments={"eps": 1e-3},
        )


def test_trl_trains_by_supervision_where_it_is_installed(tmp_path: Path) -> None:
    """Its trainer reads the output layer's weight by itself, which probes reach, too."""
    trl = pytest.importorskip("trl")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({str(i): i for i in range(64)}, unk_token="0")),
        pad_token="0",
        eos_token="1",
    )

    class Supervised(ZeroOrderMixin, trl.SFTTrainer):  # type: ignore[misc,name-defined]  # of a library that may be absent
        pass

    given = arguments(tmp_path).to_dict() | {"max_steps": 3, "bf16": False}
    fields = {field.name for field in dataclasses.fields(trl.SFTConfig)}
    args = trl.SFTConfig(**{k: v for k, v in given.items() if k in fields and v is not None})
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in ROWS])
    model = tiny()
    before = model.lm_head.weight.detach().clone()
    trainer = Supervised(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        method=MeZO,
        method_arguments={"eps": 1e-3},
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert not torch.equal(model.lm_head.weight, before)


# A Trainer pins memory unless told not to, and torch says that there is nothing to pin it for.
@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")
def test_the_example_of_the_guide_trains_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands there but for its steps: a folder, a table of texts of unequal length."""
    monkeypatch.chdir(tmp_path)
    sizes = tiny().config.to_dict() | {"vocab_size": 340, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("my-model")
    byte_tokenizer(add_bos=False).save_pretrained("my-model")
    lines = [f"a film of {10**i} hours,{('terrible', 'great')[i % 2]}" for i in range(8)]
    Path("reviews.csv").write_text("\n".join(["text,label", *lines * 14]) + "\n")
    guide = (ROOT / "docs/guide/trainer.md").read_text()
    code = guide.partition("```python\n")[2].partition("```")[0]
    assert "max_steps=1000" in code
    code = code.replace("max_steps=1000", "max_steps=2, eval_steps=1, report_to=[]")
    found: dict[str, Any] = {"__name__": "guide"}
    exec(compile(code, "docs/guide/trainer.md", "exec"), found)
    log = found["trainer"].state.log_history
    assert [line["step"] for line in log if line.get("eval_loss", 0) > 0] == [1, 2]
    assert Path("trained/model.safetensors").is_file()

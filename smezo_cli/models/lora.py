"""Train low-rank matrices beside chosen linear layers: LoRA and LoRA-FA, by peft."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from smezo_cli.errors import UserError, first_line
from smezo_cli.models.peft_layers import loaded_by_peft
from smezo_cli.zo.noise import stream_key, uniform_at


class Lora:
    """Put W + alpha/r B A in the place of W: A (r, in) and B (out, r) are trained.

    LoRA is of arXiv 2106.09685; LoRA-FA (arXiv 2308.03303) leaves A as it was drawn.

    A is uniform in +-1/sqrt(in), what Kaiming's rule gives; B is zero, so that training begins at
    the model itself. Both have the dtype of W, or of the model where that has W in 4 bits.

    Args:
        model: its linear layers are wrapped in place.
        r: rank.
        alpha: the scale is alpha/r.
        targets: ends of the names of the layers; those that the model has are taken.
        seed: keys A.
        trains_a: False leaves A frozen.

    Raises:
        UserError: no layer has such a name, or one is of a kind that peft cannot wrap.
    """

    num_places = 0

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        r: int,
        alpha: float,
        targets: list[str],
        seed: int,
        trains_a: bool = True,
    ) -> None:
        from peft import LoraConfig
        from peft.tuners.lora import LoraLayer, LoraModel

        chosen = _targeted(model, targets)
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
        config.fan_in_fan_out = any(isinstance(layer, Conv1D) for layer in chosen.values())
        try:
            with warnings.catch_warnings():  # of that flag, where there are layers of both kinds
                warnings.filterwarnings("ignore", message="fan_in_fan_out")
                LoraModel(model, config, "default")
        except ValueError as error:
            raise UserError(_unfit(model, targets, first_line(error))) from error
        self._model, self._config = model, config
        self.merges = not self._is_packed
        self._layers: dict[str, Any] = {
            name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)
        }
        for name, layer in self._layers.items():
            # All weights have one dtype; a compute dtype is autocast's affair.
            layer.cast_input_dtype_enabled = False
            if self._is_packed:
                layer.lora_A.to(model.dtype)
                layer.lora_B.to(model.dtype)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            with torch.no_grad():
                a.copy_(_kaiming(a.shape, stream_key(seed, "adapter", f"{name}.lora_A")))
                b.zero_()
            a.requires_grad_(trains_a)

    @property
    def _is_packed(self) -> bool:
        """Say whether the weights beside A and B are in 4 bits: nothing can be added to them."""
        return bool(getattr(self._model, "is_loaded_in_4bit", False))

    @property
    def loaded_by(self) -> str:
        """Return a line that names a class of transformers, or peft where nothing is merged."""
        if not self.merges:
            return f"peft loads it: {loaded_by_peft(self._model)}"
        return f"transformers loads it: {type(self._model).__name__}.from_pretrained(FOLDER)"

    @property
    def saved_bytes(self) -> int:
        """Return the bytes of the model without A and B, or those of A and B."""
        return self._bytes_of(is_adapter=not self.merges)

    def _bytes_of(self, *, is_adapter: bool) -> int:
        """Return the bytes of A and B, or of all other parameters."""
        return sum(
            p.numel() * p.element_size()
            for name, p in self._model.named_parameters()
            if (".lora_A." in name or ".lora_B." in name) is is_adapter
        )

    @contextmanager
    def off(self) -> Iterator[None]:
        """Make layers compute without A and B within the context."""
        for layer in self._layers.values():
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer._disable_adapters = False

    def save(self, folder: Path) -> None:
        """Write the whole model with B A added to its weights, as transformers saves it.

        The sums are rounded to the dtype of the weights, so that losses agree to its precision.
        Where nothing is merged, as in a model in 4 bits, A and B are written as an adapter of peft.
        """
        if not self.merges:
            self._save_alone(folder)
            return
        merged: dict[str, Tensor] = {}
        for name, tensor in self._model.state_dict().items():
            if ".lora_A." not in name and ".lora_B." not in name:
                merged[name.replace(".base_layer.", ".")] = tensor
        with torch.no_grad():
            for name, layer in self._layers.items():
                weight = merged[f"{name}.weight"]
                moved = weight.float() + layer.get_delta_weight("default").float()
                merged[f"{name}.weight"] = moved.to(weight.dtype)
        saved: Any = self._model  # without types
        saved.save_pretrained(folder, state_dict=merged)

    def _save_alone(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._config.base_model_name_or_path = self._model.config.name_or_path
        if type(self._model).__name__.endswith("ForCausalLM"):
            self._config.task_type = "CAUSAL_LM"  # for AutoPeftModelForCausalLM
        self._config.inference_mode = True
        self._config.save_pretrained(str(folder))
        self._config.inference_mode = False
        tensors = {
            f"base_model.model.{name}.lora_{which}.weight": lora["default"].weight.detach().cpu()
            for name, layer in self._layers.items()
            for which, lora in (("A", layer.lora_A), ("B", layer.lora_B))
        }
        save_file(tensors, folder / "adapter_model.safetensors")


def _targeted(model: PreTrainedModel, targets: list[str]) -> dict[str, nn.Module]:
    """Return the linear layers that the targets name.

    Raises:
        UserError: there are none, or B A cannot be added to what else has such a name.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    }
    if not found:
        raise UserError(_unfit(model, targets, "it has no layer of such a name"))
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            owners[id(p)] = owners.get(id(p), 0) + 1
    for name, module in found.items():
        if not isinstance(module, (nn.Linear, Conv1D)):
            why = f"{name} is no linear layer but of class {type(module).__name__}"
            raise UserError(_unfit(model, targets, why))
        if owners[id(module.weight)] > 1:
            why = f"the weight of {name} is that of another layer, too, to which nothing is added"
            raise UserError(_unfit(model, targets, why))
    return found


def _unfit(model: PreTrainedModel, targets: list[str], why: str) -> str:
    """Return a message that targets do not fit, with the names of the model's linear layers."""
    own: dict[str, None] = {}  # in the order of the model
    loose: Any = model  # its methods have no types
    head = loose.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            above, _, leaf = name.rpartition(".")
            own[f"{above.rpartition('.')[2]}.{leaf}" if leaf.isdigit() else leaf] = None
    named = ",".join(list(own)[:8])
    way = (
        f"name linear layers, of which it has method.adapter.targets=[{named}]"
        if named
        else "choose a method without LoRA, such as method=mezo"
    )
    return f"method.adapter.targets={targets} do not fit {type(model).__name__} ({why}): {way}."


def _kaiming(shape: torch.Size, key: tuple[int, int]) -> Tensor:
    """Draw numbers uniform in +-1/sqrt(in), float32 (out, in), on the CPU: for all devices."""
    numel = shape.numel()
    uniform = uniform_at(torch.arange(numel), numel, torch.tensor(key))
    bound: float = shape[1] ** -0.5
    return ((2 * uniform - 1) * bound).view(shape)

"""Adapters: a few weights beside a frozen model, which alone are trained.

LoRA (arXiv 2106.09685) and prefix tuning (arXiv 2101.00190) as MeZO has them (arXiv 2305.17333,
appendix E), made of ``peft``'s modules, so that peft loads what was trained. The model stays the
object that it was: its scores, its probes and its cache are those of any other.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.pytorch_utils import Conv1D

from smezo_cli.errors import UserError
from smezo_cli.zo.noise import hash64, stream_key, uniform_at


class Adapter(Protocol):
    """An adapter that is in its model."""

    #: positions that it takes of the model's window
    num_places: int

    @property
    def loaded_by(self) -> str:
        """What loads the folder that :meth:`save` writes."""

    @property
    def saved_bytes(self) -> int:
        """Of the weights that :meth:`save` writes, about."""

    def off(self) -> AbstractContextManager[None]:
        """Inside, the model computes as it came."""

    def save(self, folder: Path) -> None:
        """Write what was trained to a new folder, in a form that other programs load."""


def attach(model: PreTrainedModel, node: Mapping[str, Any], seed: int) -> Adapter:
    """Freeze the model and put an adapter into it; only its parameters require gradients then.

    Args:
        model: changed in place; on the meta device the adapter is, too.
        node: ``method.adapter``: kind, and the arguments of :class:`Lora` or :class:`Prefix`.
        seed: with a parameter's name, keys its first values; the global generator is left as it is.

    Raises:
        UserError: the adapter does not fit the model.
    """
    arguments = {key: value for key, value in node.items() if key != "kind"}
    made: Adapter
    with torch.random.fork_rng(devices=[]):  # peft draws first values, which are replaced
        if node["kind"] == "lora":
            made = Lora(model, seed=seed, **arguments)
        else:
            made = Prefix(model, seed=seed, **arguments)
    nn.Module.eval(model)
    return made


class Lora:
    """W + alpha/r B A in the place of W: A (r, in) and B (out, r) are trained.

    A is uniform in +-1/sqrt(in), what Kaiming's rule gives; B is zero, so that training begins at
    the model itself. Both have the dtype of W, or of the model where that has W in 4 bits.

    Args:
        model: its linear layers are wrapped in place.
        r: rank.
        alpha: the scale is alpha/r.
        targets: ends of the names of the layers; those that the model has are taken.
        seed: keys A.

    Raises:
        UserError: no layer has such a name, or one is of a kind that peft cannot wrap.
    """

    num_places = 0

    def __init__(
        self, model: PreTrainedModel, *, r: int, alpha: float, targets: list[str], seed: int
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
            line = str(error).partition("\n")[0].rstrip(". ")
            raise UserError(_unfit(model, targets, line[:200])) from error
        self._model, self._config = model, config
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

    @property
    def _is_packed(self) -> bool:
        """Are the weights beside A and B in 4 bits? Nothing can be added to them."""
        return bool(getattr(self._model, "is_loaded_in_4bit", False))

    @property
    def loaded_by(self) -> str:
        """A class of transformers, for it is a model like any other, unless it is in 4 bits."""
        if self._is_packed:
            name = type(self._model).__name__
            return f"peft loads it: PeftModel.from_pretrained({name}.from_pretrained(BASE), FOLDER)"
        return f"transformers loads it: {type(self._model).__name__}.from_pretrained(FOLDER)"

    @property
    def saved_bytes(self) -> int:
        """All weights of the model but A and B; these alone of a model in 4 bits."""
        if self._is_packed:
            mine = (p for p in self._model.parameters() if p.requires_grad)
            return sum(p.numel() * p.element_size() for p in mine)
        kept = (p for p in self._model.parameters() if not p.requires_grad)
        return sum(p.numel() * p.element_size() for p in kept)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, layers compute without A and B."""
        for layer in self._layers.values():
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer._disable_adapters = False

    def save(self, folder: Path) -> None:
        """The whole model with B A added to its weights, as transformers saves it.

        The sums are rounded to the dtype of the weights, so that losses agree to its precision. Of
        a model in 4 bits A and B alone, as an adapter of peft.
        """
        if self._is_packed:
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
    """The linear layers that some targets name.

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
    """Say that targets do not fit, and name the model's own linear layers."""
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


class Prefix:
    """Keys and values before the first token of every layer, which are trained.

    They begin as those of random tokens of the vocabulary at the first positions, as in MeZO; the
    text then comes behind them, as in peft. On another machine the forward that makes them may
    round otherwise.

    A masked model has no cache of its own, but its layers put the keys and values of one that they
    are given before theirs (RoBERTa, BERT); its mask is then made here, for the model would make
    one without the prefix, and see padding.

    Args:
        model: its layers take a key-value cache; its forward is wrapped in place.
        num_tokens: positions before the text.
        seed: keys the tokens.

    Raises:
        UserError: a model without such layers, or a masked one with another attention than sdpa
            and eager.
    """

    def __init__(self, model: PreTrainedModel, *, num_tokens: int, seed: int) -> None:
        from peft import PrefixEncoder, PrefixTuningConfig

        self.num_places = num_tokens
        self._is_masked = type(model).__name__.endswith("ForMaskedLM")
        attention = model.config._attn_implementation
        if self._is_masked and attention not in ("sdpa", "eager"):
            raise UserError(
                f"model.attention={attention} takes no mask that covers a prefix of a masked "
                "model: set model.attention=sdpa or eager, or choose method=mezo_lora."
            )
        first = _activations(model, num_tokens, seed, self._is_masked)
        _, heads, _, size = first[0].shape
        self._config = PrefixTuningConfig(
            task_type="FEATURE_EXTRACTION" if self._is_masked else "CAUSAL_LM",
            num_virtual_tokens=num_tokens,
            token_dim=heads * size,
            num_transformer_submodules=1,
            num_attention_heads=heads,
            num_layers=len(first) // 2,
            encoder_hidden_size=heads * size,
        )
        encoder: Any = PrefixEncoder(self._config)
        weight = encoder.embedding.weight
        with torch.no_grad():  # (tokens, layers * 2 * heads * size), as peft lays it out
            each = [t[0].transpose(0, 1).to(model.device) for t in first]
            values = torch.stack(each, dim=1).reshape(weight.shape)
        devices = [t.device for t in first[::2]]
        #: of the layers, where they lie on several
        self._devices = devices if len(set(devices)) > 1 else None
        encoder.embedding.weight = nn.Parameter(values.clone())
        model.requires_grad_(False)
        self._encoder, self._model = encoder, model
        model.add_module("prefix_encoder", encoder)
        model.__dict__["forward"] = functools.partial(self._forward, model.forward)

    def _forward(self, inner: Callable[..., Any], input_ids: Tensor, **inputs: Any) -> Any:
        """The model's forward, behind the prefix."""
        cache = inputs.get("past_key_values")
        if cache is None:
            cache = inputs["past_key_values"] = DynamicCache(config=self._model.config)
        if cache.get_seq_length() == 0:
            self._fill(cache, len(input_ids))
        if (mask := inputs.get("attention_mask")) is not None:
            ones = mask.new_ones(len(mask), self.num_places)
            mask = inputs["attention_mask"] = torch.cat([ones, mask], dim=1)
        if self._is_masked:
            weight = self._encoder.embedding.weight
            inputs["attention_mask"] = create_bidirectional_mask(
                config=self._model.config,
                inputs_embeds=weight.new_empty(*input_ids.shape, 0),  # for its shape and dtype
                attention_mask=mask,
                past_key_values=cache,
            )
        if (positions := inputs.get("position_ids")) is not None:
            inputs["position_ids"] = positions + self.num_places
        return inner(input_ids=input_ids, **inputs)

    def _fill(self, cache: DynamicCache, batch_size: int) -> None:
        """Put the prefix into an empty cache."""
        heads, layers = self._config.num_attention_heads, self._config.num_layers
        places = torch.arange(self.num_places, device=self._encoder.embedding.weight.device)
        flat = self._encoder(places)
        # (layers * 2, heads, tokens, size)
        values = flat.view(self.num_places, layers * 2, heads, -1).permute(1, 2, 0, 3)
        for layer in range(layers):
            key, value = (
                values[2 * layer + k][None].expand(batch_size, -1, -1, -1) for k in (0, 1)
            )
            if self._devices is not None:
                key, value = (t.to(self._devices[layer]) for t in (key, value))
            cache.update(key, value, layer)

    @property
    def loaded_by(self) -> str:
        """A class of peft, which loads the base model, too, unless that fills masks."""
        if self._is_masked:
            return (
                "peft loads it: PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained("
                "BASE), FOLDER), which sees the padding of batches of unequal rows"
            )
        return "peft loads it: AutoPeftModelForCausalLM.from_pretrained(FOLDER)"

    @property
    def saved_bytes(self) -> int:
        """The prefix alone."""
        weight: Tensor = self._encoder.embedding.weight
        return weight.numel() * weight.element_size()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, there is no prefix."""
        wrapped = self._model.__dict__.pop("forward")
        try:
            yield
        finally:
            self._model.__dict__["forward"] = wrapped

    def save(self, folder: Path) -> None:
        """The prefix as an adapter of peft: it cannot be merged into weights."""
        folder.mkdir(parents=True)
        self._config.base_model_name_or_path = self._model.config.name_or_path
        self._config.inference_mode = True
        self._config.save_pretrained(str(folder))
        self._config.inference_mode = False
        weight = self._encoder.embedding.weight.detach()
        save_file({"prompt_embeddings": weight.cpu()}, folder / "adapter_model.safetensors")


def _kaiming(shape: torch.Size, key: tuple[int, int]) -> Tensor:
    """Uniform in +-1/sqrt(in), float32 (out, in), on the CPU: the same on all devices."""
    numel = shape.numel()
    uniform = uniform_at(torch.arange(numel), numel, torch.tensor(key))
    bound: float = shape[1] ** -0.5
    return ((2 * uniform - 1) * bound).view(shape)


def _activations(
    model: PreTrainedModel, num_tokens: int, seed: int, is_masked: bool
) -> list[Tensor]:
    """Key and value of each layer for random tokens, one after the other: (1, heads, tokens, size).

    Raises:
        UserError: the model's layers take no cache, or are of several shapes.
    """
    key = torch.tensor(stream_key(seed, "adapter", "prefix"))
    embedding: Any = model.get_input_embeddings()
    weight = embedding if isinstance(embedding, Tensor) else embedding.weight  # Perceiver's is bare
    tokens = hash64(torch.arange(num_tokens), key) % len(weight)
    inputs = {"input_ids": tokens[None].to(model.device)}
    with torch.no_grad():
        cache: Any
        if is_masked:  # what its layers leave in a cache that they are given
            cache = DynamicCache(config=model.config)
            model(**inputs, past_key_values=cache)
        else:
            output: Any = model(**inputs, use_cache=True)
            cache = getattr(output, "past_key_values", None)
    found: list[Tensor] = []
    if isinstance(cache, DynamicCache):
        for layer in cache.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if isinstance(keys, Tensor) and isinstance(values, Tensor):
                found += [keys, values]
        if len(found) < 2 * len(cache.layers):  # others hold a state (LFM2, Qwen3-Next, Jamba)
            found = []
    shapes = {tuple(t.shape) for t in found}
    if len(shapes) != 1 or found[0].ndim != 4 or found[0].shape[2] != num_tokens:
        raise UserError(
            f"method.adapter.kind=prefix needs the keys and values of {num_tokens} tokens in every "
            f"layer, of one shape, and {type(model).__name__} does not give them: choose "
            "method=mezo_lora or method=lora."
        )
    return found

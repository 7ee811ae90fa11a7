"""Train keys and values before the text in every layer: prefix tuning (arXiv 2101.00190)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_bidirectional_mask

from smezo_cli.errors import UserError
from smezo_cli.models.before_text import BeforeText
from smezo_cli.zo.noise import hash64, stream_key


class Prefix(BeforeText):
    """Put keys and values before the first token of every layer, which are trained.

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
        #: the devices of the layers, where there are several
        self._devices = devices if len(set(devices)) > 1 else None
        encoder.embedding.weight = nn.Parameter(values.clone())
        model.requires_grad_(False)
        super().__init__(model, "prefix_encoder", encoder)

    def _forward(self, inner: Callable[..., Any], input_ids: Tensor, **inputs: Any) -> Any:
        """Run the model's forward behind the prefix."""
        cache = inputs.get("past_key_values")
        if cache is None:
            cache = inputs["past_key_values"] = DynamicCache(config=self._model.config)
        if cache.get_seq_length() == 0:
            self._fill(cache, len(input_ids))
        if (mask := inputs.get("attention_mask")) is not None:
            ones = mask.new_ones(len(mask), self.num_places)
            mask = inputs["attention_mask"] = torch.cat([ones, mask], dim=1)
        if self._is_masked:
            inputs["attention_mask"] = create_bidirectional_mask(
                config=self._model.config,
                # Its shape and dtype are looked at.
                inputs_embeds=self._weight.new_empty(*input_ids.shape, 0),
                attention_mask=mask,
                past_key_values=cache,
            )
        if (positions := inputs.get("position_ids")) is not None:
            inputs["position_ids"] = positions + self.num_places
        return inner(input_ids=input_ids, **inputs)

    def _fill(self, cache: DynamicCache, batch_size: int) -> None:
        """Put the prefix into an empty cache."""
        heads, layers = self._config.num_attention_heads, self._config.num_layers
        places = torch.arange(self.num_places, device=self._weight.device)
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
        """Return a line that names a class of peft, which loads a causal base model, too."""
        if self._is_masked:
            return (
                "peft loads it: PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained("
                "BASE), FOLDER), which sees the padding of batches of unequal rows"
            )
        return "peft loads it: AutoPeftModelForCausalLM.from_pretrained(FOLDER)"

    def save(self, folder: Path) -> None:
        """Write the prefix as an adapter of peft: it cannot be merged into weights."""
        folder.mkdir(parents=True)
        self._config.base_model_name_or_path = self._model.config.name_or_path
        self._config.inference_mode = True
        self._config.save_pretrained(str(folder))
        self._config.inference_mode = False
        weight = self._weight.detach().cpu()
        save_file({"prompt_embeddings": weight}, folder / "adapter_model.safetensors")


def _activations(
    model: PreTrainedModel, num_tokens: int, seed: int, is_masked: bool
) -> list[Tensor]:
    """Return key and value of each layer for random tokens: (1, heads, tokens, size) each.

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

"""Train embeddings before the text: prompt tuning (arXiv 2104.08691), p-tuning (2103.10385)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smezo_cli.models.before_text import BeforeText


class SoftPrompt(BeforeText):
    """Put trained embeddings before those of the text; logits are those of the text alone.

    Args:
        model: a causal one; its forward is wrapped in place.
        peft: peft's view of it, which holds the encoder of the embeddings.
    """

    def __init__(self, model: PreTrainedModel, peft: Any) -> None:
        self._peft = peft
        self.num_places = int(peft.peft_config["default"].num_virtual_tokens)
        # peft makes it in float32, whatever the model is in.
        super().__init__(model, "prompt_encoder", peft.prompt_encoder["default"].to(model.dtype))

    def _forward(self, inner: Callable[..., Any], input_ids: Tensor, **inputs: Any) -> Any:
        """Run the model's forward behind the embeddings, which a cache may hold already."""
        loose: Any = self._model  # its methods have no types
        rows, length = input_ids.shape
        if (mask := inputs.get("attention_mask")) is not None:
            ones = mask.new_ones(rows, self.num_places)
            inputs["attention_mask"] = torch.cat([ones, mask], dim=1)
        if (positions := inputs.get("position_ids")) is not None:
            inputs["position_ids"] = positions + self.num_places
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            return inner(input_ids=input_ids, **inputs)
        if (kept := inputs.get("logits_to_keep")) is not None:
            inputs["logits_to_keep"] = self._kept(kept, length)
        if positions is not None:
            before = torch.arange(self.num_places, device=positions.device)
            before = before.expand(len(positions), -1)
            inputs["position_ids"] = torch.cat([before, inputs["position_ids"]], dim=1)
        places = torch.arange(self.num_places, device=self._weight.device)
        words = loose.get_input_embeddings()(input_ids)
        prompt = self._encoder(places.expand(rows, -1)).to(words)
        whole = self.num_places + length

        def of_text(states: Tensor) -> Tensor:
            return states[:, self.num_places :] if states.shape[1] == whole else states

        def enters_head(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (of_text(args[0]), *args[1:])

        head = loose.get_output_embeddings()
        handle = None
        if isinstance(head, nn.Module):  # before the scorer's own hook, which picks positions
            handle = head.register_forward_pre_hook(enters_head, prepend=True)
        try:
            output = inner(inputs_embeds=torch.cat([prompt, words], dim=1), **inputs)
        finally:
            if handle is not None:
                handle.remove()
        output.logits = of_text(output.logits)  # of a model whose head is no module
        return output

    def _kept(self, kept: Tensor | int, length: int) -> Tensor | int:
        """Return which logits of the whole sequence are those asked for of its text.

        Args:
            kept: positions in the text, or how many of its last ones; 0: all.
            length: of the text.
        """
        return kept + self.num_places if isinstance(kept, Tensor) else min(kept, length)

    @property
    def loaded_by(self) -> str:
        """Return a line that names classes of peft and transformers."""
        base = f"{type(self._model).__name__}.from_pretrained(BASE)"
        return (
            f"peft loads it: PeftModel.from_pretrained({base}, FOLDER), whose logits begin with "
            "those of the embeddings"
        )

    def save(self, folder: Path) -> None:
        """Write the embeddings as an adapter of peft, which no weights can take in."""
        self._peft.save_pretrained(str(folder), save_embedding_layers=False)

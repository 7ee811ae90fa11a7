"""Find out whether a model's output layer gives its logits, so that some can be computed alone.

A scorer reads few rows of the vocabulary at few positions, and has the output layer compute these
alone. That is right where the logits are what this layer gives, scaled or capped element by
element. Some models name another layer (DeBERTa-v2), read its weight without calling it
(MobileBERT), or add a vector as long as the vocabulary behind it (ESM).
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from smezo_cli.errors import UserError, first_line
from smezo_cli.zo.probe import only_rows

_NUM_TOKENS = 4
# Logits of the same rows from products of other shapes; another layer's differ by their own size.
_TOLERANCE = 0.05


@torch.no_grad()
def settle_output_layer(model: nn.Module) -> None:
    """Make ``model.get_output_embeddings()`` None where that layer does not give the logits.

    Measured by two forwards over a text of four tokens.

    Args:
        model: a language model of transformers with its weights, in eval mode.

    Raises:
        UserError: the model cannot be run at all.
    """
    loose: Any = model
    head = loose.get_output_embeddings()
    device = next(model.parameters()).device
    ids = torch.arange(_NUM_TOKENS, device=device)[None]

    def logits() -> Tensor:
        found: Tensor = loose(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return found.float()

    with torch.random.fork_rng(devices=[]):  # some draw while they compute
        try:
            whole = logits()
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # whatever a model trips over that was never run here
            raise UserError(
                f"{type(model).__name__} cannot read a text of {_NUM_TOKENS} tokens here "
                f"({first_line(error)}): choose another model, or another model.attention."
            ) from error
        if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
            rows = torch.tensor([1, whole.shape[-1] - 1], device=device)
            with contextlib.suppress(RuntimeError, IndexError), only_rows(head, rows):
                some, wanted = logits(), whole[..., rows]
                if some.shape == wanted.shape:
                    size = wanted.abs().max() + 1e-6
                    if float((some - wanted).abs().max() / size) < _TOLERANCE:
                        return
            model.__dict__["get_output_embeddings"] = lambda: None

"""Put an adapter into a model: a few weights beside its own, which alone are trained.

LoRA (arXiv 2106.09685) and prefix tuning (arXiv 2101.00190) as MeZO has them (arXiv 2305.17333,
appendix E), and LoRA-FA (arXiv 2308.03303), made of ``peft``'s modules, so that peft loads what was
trained; bottlenecks of tensor-train cores as AdaZeta has them (arXiv 2406.18060); and the kinds
that peft has beside these (``peft_layers.py``). The model stays the object that it was: its scores,
its probes and its cache are those of any other.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from smezo_cli.models.lora import Lora
from smezo_cli.models.peft_layers import attach_peft
from smezo_cli.models.prefix import Prefix
from smezo_cli.models.tensor_train import TensorTrain


class Adapter(Protocol):
    """State what a run asks of an adapter that is in its model."""

    #: positions that it takes of the model's window
    num_places: int
    #: :meth:`save` writes a whole model, the adapter added to its weights; may be set to False
    merges: bool

    @property
    def loaded_by(self) -> str:
        """Return a line that says what loads the folder that :meth:`save` writes."""

    @property
    def saved_bytes(self) -> int:
        """Return about how many bytes of weights :meth:`save` writes."""

    def off(self) -> AbstractContextManager[None]:
        """Switch the adapter off within the context: the model computes as it came."""

    def save(self, folder: Path) -> None:
        """Write what was trained to a new folder, in a form that :attr:`loaded_by` names."""


def attach(
    model: PreTrainedModel,
    node: Mapping[str, Any],
    seed: int,
    warn: Callable[[str], object] = lambda _: None,
) -> Adapter:
    """Freeze the model and put an adapter into it; only its parameters require gradients then.

    Args:
        model: changed in place; on the meta device the adapter is, too.
        node: ``method.adapter``: kind, and the arguments of :class:`Lora`, :class:`Prefix` or
            :class:`TensorTrain`; or a kind of peft and its config.
        seed: with a parameter's name, keys its first values; the global generator is left as it is.
        warn: receives lines on fields that peft ignores or changes.

    Raises:
        UserError: the adapter does not fit the model.
    """
    arguments = {key: value for key, value in node.items() if key != "kind"}
    kinds: Mapping[str, Callable[..., Adapter]] = {
        "lora": Lora,
        "lora_fa": partial(Lora, trains_a=False),
        "prefix": Prefix,
        "tensor_train": TensorTrain,
    }
    of_peft = partial(attach_peft, kind=node["kind"], warn=warn)
    make = of_peft if "config" in node else kinds[node["kind"]]
    with torch.random.fork_rng(devices=[]):  # peft draws first values, which are replaced
        made = make(model, seed=seed, **arguments)
    nn.Module.eval(model)
    return made

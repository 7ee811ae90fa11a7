"""Put an adapter of any kind of peft into a model, made and saved by peft itself."""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from smezo_cli.errors import UserError, first_line
from smezo_cli.models.soft_prompt import SoftPrompt
from smezo_cli.zo.noise import stream_key

#: kinds that stand beside layers in a way that no weight can take in
_NEVER_MERGED = ("adaption_prompt", "beft")
#: what peft, torch and re raise at a config that does not fit a model
_ERRORS = (
    *(ValueError, TypeError, RuntimeError, AttributeError, LookupError, ImportError),
    *(ArithmeticError, re.error),
)


def attach_peft(
    model: PreTrainedModel,
    *,
    kind: str,
    config: Mapping[str, Any],
    seed: int,
    warn: Callable[[str], object] = lambda _: None,
) -> "PeftLayers | SoftPrompt":
    """Freeze a model and put an adapter of peft into it.

    First values are those that peft draws, from a generator that the seed keys.

    Args:
        model: its layers are wrapped in place.
        kind: as peft registers it.
        config: fields of its config; what is left out is peft's default for this kind and model.
        seed: keys the first values.
        warn: receives a line for what peft says of a field that was given, as that it is ignored.

    Raises:
        UserError: peft cannot make it for this model, it changes what other layers share, or
            something of it is empty.
    """
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType

    # As it is by default: once that is said, torch does not warn of sparse buffers.
    unchecked: Any = torch.sparse.check_sparse_tensor_invariants  # without types
    unchecked.disable()
    is_masked = type(model).__name__.endswith("ForMaskedLM")
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.upper())](
                **config, task_type="FEATURE_EXTRACTION" if is_masked else "CAUSAL_LM"
            )
            if hasattr(made, "progressbar"):
                made.progressbar = False
            if made.is_prompt_learning and is_masked:
                raise ValueError("tokens before the text are for causal models so far")
            devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
            with torch.random.fork_rng(devices=list(devices)):
                torch.manual_seed(stream_key(seed, "adapter", kind)[0] & (1 << 63) - 1)
                peft: Any = get_peft_model(model, made, autocast_adapter_dtype=False)
    except _ERRORS as error:
        if model.device.type == "meta" and isinstance(error, NotImplementedError):
            raise UserError(
                f"method.adapter.kind={kind} is made of the weights of the model, which a plan has "
                "none of: choose another kind, or try it by smezo train steps=1."
            ) from error
        raise UserError(
            f"method.adapter.kind={kind} does not fit {type(model).__name__} "
            f"({first_line(error)}): give other values of method.adapter.config, or another kind."
        ) from error
    if model.device.type == "meta":
        nn.Module.to(model, "meta")  # what peft has made elsewhere
    if empty := [n for n, p in peft.named_parameters() if p.requires_grad and not p.numel()]:
        raise UserError(
            f"method.adapter.kind={kind}: {empty[0]} of this config has no weights to train: give "
            "larger numbers in method.adapter.config."
        )
    for line in _of_fields(said, config):
        warn(line)
    if made.is_prompt_learning:
        return SoftPrompt(model, peft)
    _check_shared(model, owners, kind)
    return PeftLayers(model, peft, kind)


class PeftLayers:
    """Hold a model some of whose layers peft has wrapped.

    Args:
        model: with the wrapped layers; it stays the object that it was.
        peft: peft's view of it.
        kind: of the adapter.
    """

    num_places = 0

    def __init__(self, model: PreTrainedModel, peft: Any, kind: str) -> None:
        self._model, self._peft, self._kind = model, peft, kind
        self._config = peft.peft_config["default"]
        # peft adds B's bias to that of the layer, which few layers have.
        has_bias = bool(getattr(self._config, "lora_bias", False))
        self.merges = kind not in _NEVER_MERGED and not has_bias

    @property
    def loaded_by(self) -> str:
        """Return a line that names a class of transformers, or peft where nothing is merged."""
        name = type(self._model).__name__
        if self.merges:
            return f"transformers loads it: {name}.from_pretrained(FOLDER)"
        return f"peft loads it: {loaded_by_peft(self._model)}"

    @property
    def saved_bytes(self) -> int:
        """Return the bytes of the model without the adapter, or of what is trained."""
        return sum(
            p.numel() * p.element_size()
            for p in self._model.parameters()
            if p.requires_grad is not self.merges
        )

    def off(self) -> AbstractContextManager[None]:
        """Make layers compute without the adapter within the context."""
        off: AbstractContextManager[None] = self._peft.disable_adapter()
        return off

    def save(self, folder: Path) -> None:
        """Write the model with the adapter in its weights, or the adapter as peft saves it.

        Weights that took the adapter in are rounded to their dtype, so that losses agree to its
        precision.

        Raises:
            UserError: peft cannot merge it.
        """
        with quiet_peft():
            if not self.merges:
                self._peft.save_pretrained(str(folder), save_embedding_layers=False)
                return
            # Merging writes to the weights of wrapped layers alone; the others are shared.
            shared = {
                id(p): p for name, p in self._model.named_parameters() if ".base_layer." not in name
            }
            try:
                merged = copy.deepcopy(self._peft, shared).merge_and_unload(safe_merge=True)
            except _ERRORS as error:
                raise UserError(
                    f"peft cannot merge kind {self._kind} into the weights of "
                    f"{type(self._model).__name__} ({first_line(error)}): add --adapter."
                ) from error
            merged.save_pretrained(folder)


def loaded_by_peft(model: PreTrainedModel) -> str:
    """Return the call that puts an adapter of peft beside its base model, to the same numbers."""
    # peft makes float32 of an adapter in half precision otherwise.
    cast = "" if model.dtype == torch.float32 else ", autocast_adapter_dtype=False"
    return f"PeftModel.from_pretrained({type(model).__name__}.from_pretrained(BASE), FOLDER{cast})"


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep to oneself what peft warns of while it makes, merges or saves an adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _of_fields(said: Sequence[warnings.WarningMessage], fields: Mapping[str, Any]) -> list[str]:
    """Return lines on what peft says of these fields, each once; of all else it warns of, none."""
    texts = dict.fromkeys(
        first_line(one.message) for one in said if isinstance(one.message, Warning)
    )
    return [
        f"  adapter  peft says: {text}"
        for text in texts
        if any(re.search(rf"\b{re.escape(name)}\b", text) for name in fields)
    ]


def _check_shared(model: PreTrainedModel, owners: Mapping[int, int], kind: str) -> None:
    """Refuse an adapter beside a weight that another layer has, too, which it cannot be added to.

    Raises:
        UserError: naming the layer.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, TrainableTokensLayer):
            continue
        base: Any = module.get_base_layer()
        own = base._parameters.values() if isinstance(base, nn.Module) else ()
        if any(p is not None and owners.get(id(p), 0) > 1 for p in own):
            raise UserError(
                f"method.adapter.kind={kind}: the weight of {name} is that of another layer, too, "
                "to which nothing is added: name other layers by "
                "method.adapter.config.target_modules."
            )

"""Build the model of a run on the meta device, and rows as long as the longest it may have."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError
from smezo_cli.plan.trace import PadOnly, trace

OPTION_TOKENS = 16  # of an option of a choice task, assumed

_MOST_ROWS = 2**24  # so many are a list of 128 MB here, and more than any device computes at once

_NUM_OPTIONS = 10  # of a row of ReCoRD; other choice tasks name theirs


@dataclass(frozen=True)
class Lengths:
    """Hold the tokens of the longest rows.

    Attributes:
        training: of a row in a step.
        evaluation: of a row in an evaluation, with the demonstrations before it.
        demonstrated: of these demonstrations; 0 where there are none.
    """

    training: int
    evaluation: int
    demonstrated: int

    @property
    def own(self) -> int:
        """Return tokens of a row in an evaluation, without demonstrations."""
        return self.evaluation - self.demonstrated


@dataclass(frozen=True)
class DryRun:
    """Hold a model whose tensors have shapes and no contents, and the rows that go through it.

    Attributes:
        settings: checked ones.
        device: "cpu" or "cuda", which the plan is for.
        model: as the run holds it.
        computing: the same model in the dtype that forwards compute in; forwards go through it.
        packed: the weights that are held in 4 bits.
        lengths: of the rows.
    """

    settings: Settings
    device: str
    model: Any
    computing: Any
    packed: Sequence[Any]
    lengths: Lengths

    @property
    def dtype(self) -> Any:
        """Return the dtype of the weights."""
        return _dtype(self.settings.dtype)

    @property
    def compute_dtype(self) -> Any:
        """Return the dtype of activations."""
        return _dtype(self.settings.compute_dtype or self.settings.dtype)

    @property
    def kind(self) -> str:
        """Return the kind of the task: "classification", "choice" or "generation"."""
        return str(self.settings.task["kind"])

    @property
    def num_options(self) -> int:
        """Return options of a row: those that the task names, or as many as are assumed."""
        if self.kind == "generation":
            return 1
        task = self.settings.task
        named = task.get("options") or task.get("source", {}).get("options")
        return len(named) if isinstance(named, list) else _NUM_OPTIONS

    @property
    def cast_bytes(self) -> int:
        """Return bytes of a weight's copy in the compute dtype, where weights have another form."""
        copied = list(self.packed)
        if not copied and self.compute_dtype != self.dtype:
            copied = list(self.model.parameters())
        return max((p.numel() for p in copied), default=0) * int(self.compute_dtype.itemsize)

    def scorer(self) -> Any:
        """Return the scorer that a run has, for the model that computes."""
        from smezo_cli.scoring.scorer import Scorer

        return Scorer(self.computing, PadOnly())

    def count(self, call: Callable[[], Any], *, is_fused: bool = True) -> tuple[int, int]:
        """Return the most bytes beside the model's that live during `call`, and those that stay."""
        held = [*self.computing.parameters(), *self.computing.buffers()]
        return trace(held, call, is_fused=is_fused)

    def rows(self, count: int, tokens: int) -> list[Any]:
        """Return equal rows of so many tokens, as the kind of the task has them."""
        from smezo_cli.scoring.candidates import Candidates

        ids = (1,) * tokens
        if self.settings.model["family"] == "masked":
            row = Candidates((ids, ids), (1, 1), 0, False, mask=1, context=ids)
        elif self.kind == "classification":
            row = Candidates((ids, (*ids[:-1], 2)), (1, 1), 0, False)
        else:
            generates = self.kind == "generation"
            option = self.settings.task["max_new_tokens"] if generates else OPTION_TOKENS
            option = max(1, min(option, tokens - 2))
            sequences = [(*ids[: tokens - option], *(k,) * option) for k in range(self.num_options)]
            row = Candidates(
                tuple(sequences), (option,) * len(sequences), 0, False, self.kind, context=ids
            )
        if self.settings.task.get("sfc"):
            row = dataclasses.replace(row, base=_base_of(row))
        if count > _MOST_ROWS:
            raise UserError(
                f"{count:,} rows at once: a plan counts at most {_MOST_ROWS:,}; lower batch_size."
            )
        return [row] * count

    def micro_batch(self) -> list[Any]:
        """Return the most rows that a step computes together."""
        return self.rows(self.micro_batch_size, self.lengths.training)

    @property
    def micro_batch_size(self) -> int:
        """Return how many these are."""
        s = self.settings
        return int(min(s.batch_size, s.micro_batch_size or s.batch_size))

    def demonstrated(self, row: Any, first: int) -> Any:
        """Return the row behind demonstrations, its own first token being `first`."""
        head = (0,) * self.lengths.demonstrated
        full = tuple((*head, first, *ids[1:]) for ids in row.full)
        return dataclasses.replace(row, full=full, context=full[0] if row.context else ())

    def generate(self) -> None:
        """Compute the prompts of a batch of the longest rows, and the last token of the answers."""
        import torch

        from smezo_cli.scoring.scorer import EVAL_ANSWERS

        past = None
        for width in (self.lengths.evaluation - 1, 1):
            ids = torch.zeros(EVAL_ANSWERS, width, dtype=torch.int64, device="meta")
            more: dict[str, Any] = {} if past is None else {"past_key_values": past}
            output = self.computing(input_ids=ids, use_cache=True, logits_to_keep=1, **more)
            past = output.past_key_values


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _base_of(row: Any) -> Any:
    """Return the candidates behind a domain-conditional prompt of one token, or a mask alone."""
    sequences = tuple((1, *ids[-n:]) for ids, n in zip(row.full, row.num_option, strict=True))
    masked = {} if row.mask is None else {"mask": 1, "context": sequences[0]}
    return dataclasses.replace(row, full=sequences, label=-1, **masked)


# --- building ---------------------------------------------------------------------------------


def dry_run(settings: Settings, device: str, tokens: int | None, num_demonstrations: int) -> DryRun:
    """Build the model of these settings on the meta device.

    Args:
        settings: checked ones.
        device: "cpu" or "cuda".
        tokens: of the longest row; None takes ``model.max_length``.
        num_demonstrations: rows that stand before each row of an evaluation.

    Raises:
        UserError: an architecture that is not known, or 4 bits on a CPU.
    """
    node = architecture(settings.model)
    adapter = settings.method.get("adapter")
    model = _build_model(node, settings.dtype, adapter)
    computing = model
    if settings.compute_dtype not in (None, settings.dtype):
        computing = _build_model(node, settings.compute_dtype, adapter)
    packed = _linear_weights(model) if settings.model["quantization"] else []
    if packed and device != "cuda":
        raise UserError(
            "model.quantization=4bit needs CUDA: plan it with device=cuda --memory SIZE, or "
            "leave model.quantization out."
        )
    lengths = _lengths(settings, tokens, num_demonstrations)
    if adapter is None:
        method = _freeze_unread(settings.method, model, computing)
        settings = dataclasses.replace(settings, method=dict(method))
    return DryRun(settings, device, model, computing, packed, lengths)


def _freeze_unread(node: Mapping[str, Any], *models: Any) -> Mapping[str, Any]:
    """Freeze what a text does not read, as a run does; return the method's node for the rest."""
    from smezo_cli.models.modalities import freeze_unread, without_unread

    def unread(model: Any) -> list[str]:
        found: list[list[str]] = []
        trace((), lambda: found.append(freeze_unread(model)))
        return found[0]

    for model in models:
        node = without_unread(node, model, unread(model))
    return node


def _lengths(settings: Settings, tokens: int | None, num_demonstrations: int) -> Lengths:
    window = settings.model["max_length"]
    evaluation, demonstrated = tokens or window, 0
    if num_demonstrations:
        row = min(evaluation, window // 2)  # demonstrations leave half of the window at least
        demonstrated = min(num_demonstrations * row, window - row)
        evaluation = row + demonstrated
    longest = settings.task["max_train_tokens"] or evaluation
    return Lengths(max(4, min(longest, evaluation)), evaluation, demonstrated)


def _linear_weights(model: Any) -> list[Any]:
    """Return the weights of linear layers, but for the output layer and the adapter."""
    import torch

    head = model.get_output_embeddings()
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and "lora_" not in name
    ]


def _build_model(node: Mapping[str, Any], dtype: str, adapter: Mapping[str, Any] | None) -> Any:
    from smezo_cli.models.adapter import attach
    from smezo_cli.models.architecture import build_meta

    model: Any = build_meta({**node, "dtype": dtype})
    model.config.use_cache = False
    if adapter is not None:
        attach(model, adapter, seed=0)
    return model.eval()


def architecture(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model node with `config`: its own, or that of the files that it names.

    These are in the folder `model.path`, or in the hub's cache.

    Raises:
        UserError: neither has one.
    """
    if model.get("config"):
        return dict(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from transformers import CONFIG_MAPPING

    found: object = Path(str(model["path"])).expanduser() / "config.json"
    if isinstance(found, Path) and not found.is_file():
        try:
            found = try_to_load_from_cache(
                str(model["path"]), "config.json", revision=model["revision"] or "main"
            )
        except HFValidationError:
            found = None
    try:
        numbers = json.loads(Path(str(found)).read_text(encoding="utf-8"))
        known = CONFIG_MAPPING[numbers["model_type"]]()
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"model={model['name']} has no model.config, and model.path={model['path']} is no "
            "folder with a config.json that transformers knows (nor in the hub's cache): give "
            "such a folder by model.path=FOLDER, or choose a model of smezo ls models."
        ) from None
    own = {name: value for name, value in numbers.items() if hasattr(known, name)}
    return dict(model) | {"config": {**own, "model_type": numbers["model_type"]}}

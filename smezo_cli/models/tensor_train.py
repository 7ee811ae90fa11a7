"""Train bottlenecks behind attention and feed-forward layers, made of tensor-train cores.

LoRETTA's adapters (arXiv 2402.11417), as AdaZeta has them (arXiv 2406.18060).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from smezo_cli.errors import UserError
from smezo_cli.files.bounded import check_ordinary, read_json
from smezo_cli.zo.noise import draw, stream_key

#: files of an exported adapter
SETTINGS_FILE, TENSORS_FILE = "tensor_train.json", "tensor_train.safetensors"

# The linear layers of a block that write to the residual stream, of attention and feed-forward.
_OF_LLAMA = ("self_attn.o_proj", "mlp.down_proj")
_PLACES: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _OF_LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _OF_LLAMA),
    "opt": ("self_attn.out_proj", "fc2"),
    "roberta": ("attention.output.dense", "output.dense"),
}
_NAME = "bottleneck"  # of the module inside of such a layer


class Bottleneck(nn.Module):
    """Compute y + up(relu(down(y))); the matrices of down and up are products of small cores.

    A matrix (m1 m2 m3, n1 n2 n3) has the cores (1, m1, r), (r, m2, r), (r, m3, r), (r, n1, r),
    (r, n2, r), (r, n3, 1): its entry at (i1 i2 i3, j1 j2 j3) is the product of the slices at i1,
    ..., j3. So its rank is r at most.

    The cores lie end to end in one parameter of this module, which reads it in its own forward: a
    pass over a dozen tensors of a hundred numbers takes a dozen times as long as one over a tensor
    of a thousand. They are float32 whatever the model is, and so are their products (but for
    autocast): entries of cores are some ten times as large as those of a matrix, so that a
    perturbation would be lost in lower precision.

    Args:
        width: numbers in y.
        size: of the bottleneck, numbers between down and up.
        rank: r.
        bias: whether down and up add a vector each, which begins as zeros.
        device: of the parameters.
    """

    def __init__(
        self, width: int, size: int, rank: int, bias: bool, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.is_off = False
        self._shapes = {
            f"{which}_{place}": shape
            for which, rows, columns in (("down", width, size), ("up", size, width))
            for place, shape in enumerate(core_shapes(rows, columns, rank))
        }
        self._num_left = {"down": len(factors(width)), "up": len(factors(size))}
        total = sum(map(math.prod, self._shapes.values()))
        self.register_parameter("cores", nn.Parameter(torch.zeros(total, device=device)))
        for which, length in (("down", size), ("up", width)):
            vector = nn.Parameter(torch.zeros(length, device=device)) if bias else None
            self.register_parameter(f"{which}_bias", vector)

    def tensors(self) -> dict[str, Tensor]:
        """Return the present cores in their shapes, and the biases, by name; a probe's inside it.

        "down_0" is the first core of down. They are views of the parameters.
        """
        flat = self._parameters["cores"]
        assert flat is not None
        parts = flat.split_with_sizes([math.prod(shape) for shape in self._shapes.values()])
        found = {n: x.view(s) for (n, s), x in zip(self._shapes.items(), parts, strict=True)}
        biases = {name: self._parameters[name] for name in ("down_bias", "up_bias")}
        return found | {name: bias for name, bias in biases.items() if bias is not None}

    @torch.no_grad()
    def set_first_values(self, seed: int, name: str) -> None:
        """Draw the cores so that entries of a matrix have variance 1 / (rows + columns).

        The last core of up stays zero, so that the module returns y itself at first.

        Args:
            seed: with the names, keys the numbers.
            name: of this module in its model.
        """
        found = self.tensors()
        for which in ("down", "up"):
            parts = self._split(which, found)
            cores = [*parts[0], *parts[1]]
            rows, columns = (math.prod(core.shape[1] for core in part) for part in parts)
            scale = (rows + columns) ** (-0.5 / len(cores))
            for place, core in enumerate(cores[:-1] if which == "up" else cores):
                key = torch.tensor(stream_key(seed, "adapter", f"{name}.{which}_{place}"))
                numel = core.numel()
                z = draw(torch.arange(numel), numel, key, "gaussian").view(core.shape)
                core.copy_(z * (scale * core.shape[2] ** -0.5))

    def _split(self, which: str, found: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the cores of the rows of "down" or "up", and those of the columns."""
        cores = [found[name] for name in self._shapes if name.startswith(which)]
        return cores[: self._num_left[which]], cores[self._num_left[which] :]

    def forward(self, y: Tensor) -> Tensor:
        """Return a tensor of the shape and dtype of y: (..., width)."""
        found = self.tensors()
        inner = torch.relu(self._times("down", y.float(), found))
        return y + self._times("up", inner, found).to(y.dtype)

    def _times(self, which: str, x: Tensor, found: Mapping[str, Tensor]) -> Tensor:
        """Return x (..., rows) times the matrix, plus the bias: (..., columns)."""
        left, right = map(_joined, self._split(which, found))
        product = x @ left @ right.reshape(left.shape[1], -1)
        bias = found.get(f"{which}_bias")
        return product if bias is None else product + bias


def _joined(cores: Sequence[Tensor]) -> Tensor:
    """Contract a row of cores over the ranks between them: (first rank * sizes, last rank)."""
    joined = cores[0].reshape(-1, cores[0].shape[2])
    for core in cores[1:]:
        joined = (joined @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[2])
    return joined


def core_shapes(rows: int, columns: int, rank: int) -> list[tuple[int, int, int]]:
    """Return the shapes of the cores of a matrix (rows, columns), those of the rows first."""
    sizes = [*factors(rows), *factors(columns)]
    ranks = [1, *[rank] * (len(sizes) - 1), 1]
    return list(zip(ranks, sizes, ranks[1:], strict=False))


def factors(size: int) -> list[int]:
    """Return three factors of a size with the least sum, ascending; fewer where some would be 1."""
    best = (1, 1, size)
    for a in range(1, round(size ** (1 / 3)) + 2):
        if size % a == 0:
            for b in range(a, math.isqrt(size // a) + 1):
                if (size // a) % b == 0:
                    best = min(best, (a, b, size // a // b), key=sum)
    return [factor for factor in best if factor > 1] or [1]


class TensorTrain:
    """Put a :class:`Bottleneck` behind the last layer of attention and feed-forward of each block.

    That is where Houlsby's adapters stand (arXiv 1902.00751), before what was there is added again.
    The layer's own output is the bottleneck's input.

    Args:
        model: its linear layers get a module inside of them, and a hook that calls it.
        bottleneck: numbers between down and up.
        rank: of the cores.
        bias: whether down and up add a trained vector, too.
        seed: keys the first values.

    Raises:
        UserError: a model whose blocks are not known.
    """

    num_places = 0
    merges = False

    def __init__(
        self, model: PreTrainedModel, *, bottleneck: int, rank: int, bias: bool, seed: int
    ) -> None:
        layers = _layers(model)
        self._model = model
        self._settings = {"bottleneck": bottleneck, "rank": rank, "bias": bias}
        model.requires_grad_(False)
        self._bottlenecks: dict[str, Bottleneck] = {}
        for name, layer in layers.items():
            device = layer.weight.device
            made = Bottleneck(layer.out_features, bottleneck, rank, bias, device)
            made.set_first_values(seed, f"{name}.{_NAME}")
            layer.add_module(_NAME, made)
            layer.register_forward_hook(_through_bottleneck)
            self._bottlenecks[f"{name}.{_NAME}"] = made

    def _tensors(self) -> dict[str, Tensor]:
        """Return all cores and biases by their names in the model."""
        return {
            f"{name}.{own}": tensor.detach()
            for name, module in self._bottlenecks.items()
            for own, tensor in module.tensors().items()
        }

    @property
    def loaded_by(self) -> str:
        """Return a line that says why nothing was merged, and what loads the adapter."""
        family = "MaskedLM" if type(self._model).__name__.endswith("ForMaskedLM") else "CausalLM"
        return (
            "a bottleneck has a nonlinearity and cannot be merged into the weights: "
            f"smezo_cli.models.tensor_train.load(AutoModelFor{family}.from_pretrained(BASE), "
            "FOLDER) puts it into its base model"
        )

    @property
    def saved_bytes(self) -> int:
        """Return the bytes of the cores."""
        return sum(p.numel() * p.element_size() for p in self._tensors().values())

    @contextmanager
    def off(self) -> Iterator[None]:
        """Make layers return their own output within the context."""
        for module in self._bottlenecks.values():
            module.is_off = True
        try:
            yield
        finally:
            for module in self._bottlenecks.values():
                module.is_off = False

    def save(self, folder: Path) -> None:
        """Write settings and cores, which :func:`load` puts into the base model again."""
        folder.mkdir(parents=True)
        base = {
            "base_model": str(self._model.config.name_or_path),
            "model_type": _kind(self._model),
        }
        words = json.dumps(base | self._settings, indent=2)
        (folder / SETTINGS_FILE).write_text(words + "\n", encoding="utf-8")
        tensors = {name: tensor.cpu().clone() for name, tensor in self._tensors().items()}
        save_file(tensors, folder / TENSORS_FILE)

    @torch.no_grad()
    def set_cores(self, saved: Mapping[str, Tensor], where: Path) -> None:
        """Copy saved cores into the model.

        Raises:
            UserError: they are of another model.
        """
        mine = self._tensors()
        shapes = {name: tuple(t.shape) for name, t in mine.items()}
        if shapes != {name: tuple(t.shape) for name, t in saved.items()}:
            raise UserError(
                f"{where} holds adapters of another model than {type(self._model).__name__} of "
                f"{len(mine)} cores: give the base model that they were trained with."
            )
        for name, tensor in saved.items():
            mine[name].copy_(tensor)


def load(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Put an exported adapter into its base model, and return the model.

    Args:
        model: as it was before the training; changed in place.
        folder: that ``smezo export`` wrote.

    Raises:
        UserError: the folder holds no such adapter, or that of another model.
    """
    path = Path(folder)
    settings = read_json(path / SETTINGS_FILE) or {}
    sizes = [settings.get(key) for key in ("bottleneck", "rank")]
    bias = settings.get("bias")
    if not all(type(n) is int and 0 < n <= 1 << 20 for n in sizes) or not isinstance(bias, bool):
        raise UserError(f"{path} has no {SETTINGS_FILE} of smezo: give a folder of smezo export.")
    _check_kind(model, settings, path)
    try:
        check_ordinary(path / TENSORS_FILE)
        with safe_open(path / TENSORS_FILE, framework="pt") as file:
            names = list(file.keys())
            saved = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path / TENSORS_FILE} cannot be read ({error}): export it again."
        ) from error
    size, rank = (int(n) for n in sizes if n is not None)
    made = TensorTrain(model, bottleneck=size, rank=rank, bias=bias, seed=0)
    made.set_cores(saved, path)
    nn.Module.eval(model)
    return model


def _check_kind(model: PreTrainedModel, settings: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for an adapter of another architecture: names and shapes may be the same."""
    kind, trained = _kind(model), settings.get("model_type")
    if trained != kind:
        base = settings.get("base_model")
        raise UserError(
            f"{path} holds adapters of a model of type {trained}, and {type(model).__name__} is of "
            f"type {kind}: give the base model that they were trained with"
            + (f", {base}." if base else ".")
        )


def _through_bottleneck(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
    """Return the output of a layer behind its bottleneck; a hook of the layer's forward."""
    module = layer._modules[_NAME]
    assert isinstance(module, Bottleneck)
    if module.is_off:
        return None
    found: Tensor = module(output)
    return found


def _kind(model: PreTrainedModel) -> str:
    config: Any = model.config.get_text_config()
    return str(config.model_type)


def _layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the last linear layers of attention and feed-forward of all blocks, by name.

    Raises:
        UserError: blocks of this model are not known, or are built otherwise.
    """
    places = _PLACES.get(_kind(model), ())
    named = dict(model.named_modules())
    found: dict[str, nn.Linear] = {}
    for name in named:
        at = [named.get(f"{name}.{place}") for place in places]
        if at and all(isinstance(layer, nn.Linear) for layer in at):
            for place, layer in zip(places, at, strict=True):
                assert isinstance(layer, nn.Linear)
                found[f"{name}.{place}"] = layer
    if not found:
        raise UserError(
            "method.adapter.kind=tensor_train knows the blocks of Llama, Mistral, Qwen, Gemma, OPT "
            f"and RoBERTa, and {type(model).__name__} ({_kind(model)}) is none of them: choose "
            "method=mezo_lora."
        )
    return found

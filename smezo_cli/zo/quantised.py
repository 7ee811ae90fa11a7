"""Hold the weights of linear layers as integer codes of 8 or 4 bits, with a scale a group.

    weight[i, j] = codes[i, j] * scales[i, j // group_size]

Symmetric: codes lie in [-127, 127] or [-7, 7], two of 4 bits in a byte. A forward writes the
weights of one layer out in its dtype and drops them again, so that no float copy of all of them is
ever held.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smezo_cli.zo.passes.eager import chunk_size, over_chunks

BITS = (8, 4)
SMALLEST = 1024  # weights; a smaller matrix stays as it is, for it would save a few hundred bytes


class QuantisedLinear(nn.Module):
    """Compute as ``nn.Linear`` does, with weights that are codes.

    Attributes:
        weight: the codes: int8 (out, in), or uint8 (out, ceil(in / 2)) with two of 4 bits a byte,
            the even column in the low half, plus 8. Never has a gradient. A probe puts moved
            weights (out, in) of a floating dtype in its place.
        scales: float32 (out, groups).
        bias: (out,) or None.
        kept: the weights at ``kept_at`` in their own dtype, which stand in for those of the codes;
            or None. They may be trained by any method, as any other parameter.
        kept_at: int64, positions in the flat weight; or None.
        bits: 8 or 4.
        group_size: columns that share a scale; the last group of a row may be shorter.
        is_trained: whether a method may change the codes.

    Args:
        linear: whose weights are taken; it is left as it is.
        bits: 8 or 4.
        group_size: columns that share a scale.
        kept_at: int64, positions in the flat weight that keep their own number; None: none does.

    Raises:
        ValueError: a weight is not finite, or an argument is out of range.
    """

    weight: nn.Parameter
    scales: nn.Parameter
    bias: nn.Parameter | None
    kept: nn.Parameter | None
    kept_at: Tensor | None

    def __init__(
        self, linear: nn.Linear, bits: int, group_size: int, kept_at: Tensor | None = None
    ) -> None:
        super().__init__()
        if bits not in BITS:
            raise ValueError(f"bits={bits}: 8 or 4")
        if group_size < 1:
            raise ValueError(f"group_size={group_size}: must be at least 1")
        weight = linear.weight.detach()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.bits, self.group_size = bits, min(group_size, linear.in_features)
        self.dtype = weight.dtype
        self.is_trained = linear.weight.requires_grad
        scales = _scales_of(weight, self.group_size, self.largest)
        self.scales = nn.Parameter(scales, requires_grad=False)
        width = self.in_features if bits == 8 else (self.in_features + 1) // 2
        codes = torch.empty(
            self.out_features,
            width,
            dtype=torch.int8 if bits == 8 else torch.uint8,
            device=weight.device,
        )
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias
        kept = None if kept_at is None else weight.view(-1)[kept_at].clone()
        self.kept = None if kept is None else nn.Parameter(kept)
        self.register_buffer("kept_at", kept_at)
        for rows in self._parts():
            nearest = (weight[rows].float() / self.scale_of(rows)).round_()
            self.store(rows, nearest.clamp_(-self.largest, self.largest).to(torch.int8))
        self.train(linear.training)

    @property
    def largest(self) -> int:
        """Return the largest code: 127 or 7."""
        return int(2 ** (self.bits - 1)) - 1

    @property
    def num_weights(self) -> int:
        """Return how many weights the matrix has."""
        return self.out_features * self.in_features

    @property
    def moved_as(self) -> Mapping[str, tuple[torch.Size, torch.dtype]]:
        """Return shape and dtype of the moved copy that a probe puts in place of the codes."""
        return {"weight": (torch.Size((self.out_features, self.in_features)), self.dtype)}

    def codes(self, rows: slice | Tensor) -> Tensor:
        """Return the codes of some rows: int8 (r, in), a copy."""
        held = self.weight[rows]
        if self.bits == 8:
            return held.clone()
        both = torch.stack((held & 15, held >> 4), dim=-1).view(held.shape[0], -1)
        return both[:, : self.in_features].to(torch.int8) - 8

    def store(self, rows: slice, codes: Tensor) -> None:
        """Write the codes (int8 (r, in)) of some rows."""
        if self.bits == 4:
            shifted = (codes + 8).to(torch.uint8)
            if self.in_features % 2:
                shifted = F.pad(shifted, (0, 1), value=8)
            codes = shifted[:, ::2] | (shifted[:, 1::2] << 4)
        self.weight.detach()[rows] = codes

    def scale_of(self, rows: slice | Tensor) -> Tensor:
        """Return the scale of each weight of some rows: float32 (r, in)."""
        return self.scales[rows].repeat_interleave(self.group_size, 1)[:, : self.in_features]

    def rows(self, rows: slice | Tensor) -> Tensor:
        """Return some rows of the weights as numbers: (r, in), of the layer's dtype."""
        return (self.codes(rows).float() * self.scale_of(rows)).to(self.dtype)

    def write(self, out: Tensor) -> None:
        """Write all weights to ``out`` (contiguous, as many, of a floating dtype)."""
        shaped = out.view(-1, self.in_features)

        def one(rows: slice) -> None:
            shaped[rows] = (self.codes(rows).float() * self.scale_of(rows)).to(out.dtype)

        self.by_rows(one, self.weight.shape[0])

    def by_rows(self, one: Callable[[slice], None], count: int) -> None:
        """Call ``one`` for parts of the first ``count`` rows that fit the cache.

        On a CPU in as many threads as torch has.
        """
        over_chunks(count, self.weight.device, one, self._rows_together())

    def values(self, index: Tensor | None = None) -> Tensor:
        """Return the weights at flat positions (int64 (n,)), or all: float32, flat."""
        if index is None:
            index = torch.arange(self.num_weights, device=self.weight.device)
        row, column = index // self.in_features, index % self.in_features
        if self.bits == 8:
            codes = self.weight[row, column].float()
        else:
            both = self.weight[row, column // 2]
            codes = torch.where(column % 2 == 0, both & 15, both >> 4).float() - 8
        return codes * self.scales[row, column // self.group_size]

    def plain(self) -> nn.Linear:
        """Return a linear layer that holds the weights as numbers; it shares the bias."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False, dtype=self.dtype)
        linear.weight = nn.Parameter(self.dense().detach(), requires_grad=self.is_trained)
        linear.bias = self.bias  # type: ignore[assignment]  # None is a bias of it
        return linear.train(self.training)

    def dense(self) -> Tensor:
        """Return all weights as numbers: (out, in), new; gradients reach ``kept``."""
        held = self.weight
        if held.is_floating_point():  # moved by a probe
            dense = held if self.kept is None else held.clone()
        else:
            with torch.no_grad():
                shape = (held.shape[0], self.in_features)
                dense = torch.empty(shape, dtype=self.dtype, device=held.device)
                self.write(dense)
        if self.kept is not None and self.kept_at is not None:
            dense.view(-1).index_copy_(0, self.kept_at, self.kept.to(dense.dtype))
        return dense

    def forward(self, x: Tensor) -> Tensor:
        """See ``nn.Linear``."""
        weight = self.dense()
        if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            weight = weight.to(x.dtype)
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        """Describe the layer, for ``print(model)``."""
        kept = "" if self.kept is None else f", kept={self.kept.numel()}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}{kept}"
        )

    def _rows_together(self) -> int:
        return max(1, chunk_size(self.weight.device) // self.in_features)

    def _parts(self) -> Iterator[slice]:
        together = self._rows_together()
        for start in range(0, self.out_features, together):
            yield slice(start, min(start + together, self.out_features))


def _scales_of(weight: Tensor, group_size: int, largest: int) -> Tensor:
    """Return the largest magnitude of each group over the largest code: float32 (out, groups).

    A group of zeros takes that of the largest group, so that a step can move it.

    Raises:
        ValueError: a weight is not finite.
    """
    groups: tuple[Tensor, ...] = torch.split(weight, group_size, 1)
    size = torch.stack([part.abs().amax(1).float() for part in groups], 1)
    if weight.device.type == "meta":
        return size / largest
    most = float(size.max())
    if not most < float("inf"):  # NaN is not below it, either
        raise ValueError("a weight is NaN or infinite before training")
    return torch.where(size > 0, size, torch.full_like(size, most or 1.0)) / largest


def linear_layers(model: nn.Module, *, trained: bool = True) -> dict[str, nn.Linear]:
    """Return the layers whose weights can be held as codes, by name.

    Plain ``nn.Linear`` layers of at least :data:`SMALLEST` weights. Not the output layer of a
    language model, nor one whose weight another module shares, such as an embedding.

    Args:
        model: any module.
        trained: leave out those whose weights require no gradient.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                uses[id(p)] = uses.get(id(p), 0) + 1
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: module
        for name, module in model.named_modules()
        if name  # a model that is such a layer itself has nothing to hold another one
        and type(module) is nn.Linear
        and module is not output
        and (module.weight.requires_grad or not trained)
        and module.weight.numel() >= SMALLEST
        and uses[id(module.weight)] == 1
    }


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    """Return the layers of a model that hold codes, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put another module in the place of the one called ``name``, wherever that one stands."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = layer


def quantise(model: nn.Module, bits: int, group_size: int) -> int:
    """Hold the weights of :func:`linear_layers` as codes, one layer after the other.

    Layers that hold codes already stay as they are.

    Args:
        model: is changed in place.
        bits: 8 or 4.
        group_size: columns that share a scale.

    Returns:
        How many layers hold codes now.

    Raises:
        ValueError: a weight is not finite, or there are codes of another form.
    """
    for name, layer in quantised_layers(model).items():
        if layer.bits != bits or layer.group_size != min(group_size, layer.in_features):
            raise ValueError(
                f"{name} holds codes of {layer.bits} bits in groups of {layer.group_size} already, "
                f"not of {bits} bits in groups of {group_size}: begin with the model as it came"
            )
    layers = linear_layers(model)
    for name in list(layers):
        with torch.inference_mode(False), torch.no_grad():
            # Popped, so that the float weights of a layer go before the next one is read.
            replace(model, name, QuantisedLinear(layers.pop(name), bits, group_size))
    return len(quantised_layers(model))

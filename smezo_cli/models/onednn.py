"""Compute linear layers by oneDNN on a CPU where torch's own choice may be slower.

In float32 torch multiplies matrices by MKL, whose fast kernels are for one make of processor.
oneDNN, which torch carries for low precision, is about twice as fast on others. The choice hangs
on the build and on a proof that the products are right, never on a timing, so that a resumed run
computes the same bits.
"""

import math
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from smezo_cli.zo.passes import openmp

_ROWS = (1, 16, 64)  # of the inputs that a proof multiplies,
_MOST = 1 << 20  # but for those that give more numbers, lest a proof be the peak of a run's memory
# Allowed between oneDNN's sum of K products and torch's, times |x| |w| (and the bias): rounding
# errors of sums in another order grow as sqrt(K) 2^-24; 60 times what was measured is no part left
# out, which is off by |x| |w| / sqrt(K).
_TOLERANCE = 16 * 2.0**-24


def use_onednn(model: nn.Module, say: Callable[[str], None] = lambda line: None) -> int:
    """Give the plain linear layers of a float32 model on a CPU a faster forward without gradients.

    Before it is used with a number of threads, and for a shape of the weights, oneDNN's product is
    compared with torch's; where it is another, or OpenMP may give fewer threads than oneDNN counts
    on, torch's is used.

    Args:
        model: its :class:`torch.nn.Linear` layers are changed in place; with gradients they compute
            as before.
        say: receives a line where oneDNN is left aside, now or later.

    Returns:
        How many layers were changed; 0 where this build of torch has no oneDNN, or its products
        are not right here.
    """
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # untyped in torch
    if not has_onednn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return 0
    layers = [
        m
        for m in model.modules()
        if type(m) is nn.Linear
        and m.weight.device.type == "cpu"
        and m.weight.dtype == torch.float32
    ]
    proof = _Proof(say)
    if not all(proof.holds(layer.weight, layer.bias) for layer in layers):
        return 0
    for layer in layers:
        layer.__dict__["_proof"] = proof
        layer.__dict__["forward"] = types.MethodType(_forward, layer)
    return len(layers)


def is_slow(dtype: torch.dtype) -> bool:
    """Return whether this processor multiplies matrices of a dtype number by number.

    torch leaves bfloat16 and float16 to oneDNN where the processor has instructions that serve
    them (AVX-512, Arm's own). Elsewhere a product of 2048 x 2048 took 280 times as long as in
    float32 (one core with AVX2, torch 2.13.0).
    """
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    asks = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return name is not None and asks is not None and not asks()


def num_onednn(model: nn.Module) -> int:
    """Return how many layers compute by oneDNN with the present number of threads."""
    return sum(layer.__dict__["_proof"].is_used for layer in _changed(model))


@contextmanager
def as_torch_has_it(model: nn.Module) -> Iterator[None]:
    """Make linear layers compute as without :func:`use_onednn` within the context."""
    changed = [(layer, layer.__dict__["forward"]) for layer in _changed(model)]
    for layer, _ in changed:
        del layer.__dict__["forward"]
    try:
        yield
    finally:
        for layer, forward in changed:
            layer.__dict__["forward"] = forward


def _changed(model: nn.Module) -> list[nn.Module]:
    return [
        layer
        for layer in model.modules()
        if getattr(layer.__dict__.get("forward"), "__func__", None) is _forward
    ]


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    proof: _Proof = self.__dict__["_proof"]
    if torch.is_grad_enabled() or _has_tangent(x, self.weight):
        return F.linear(x, self.weight, self.bias)
    if not proof.holds(self.weight, self.bias):
        return F.linear(x, self.weight, self.bias)
    return _product(x, self.weight, self.bias)


_forward.is_linear = True  # type: ignore[attr-defined]  # read by probes: x W^T + b, and no more


def _has_tangent(*tensors: Tensor) -> bool:
    """Say whether forward-mode differentiation goes on: oneDNN's product would drop tangents."""
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)  # type: ignore[no-untyped-call]  # untyped in torch


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _Proof:
    """Know for which shapes and numbers of threads oneDNN's products are right; one a model.

    Args:
        say: receives a line where they are not; from then on they count as wrong for all shapes
            with that number of threads.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._found: dict[tuple[int, torch.Size, bool], bool] = {}
        self._wrong: set[int] = set()  # numbers of threads

    def __deepcopy__(self, memo: object) -> "_Proof":
        return self  # of a copied model: as good for it

    @property
    def is_used(self) -> bool:
        """Say whether no product was wrong with the present number of threads."""
        return torch.get_num_threads() not in self._wrong

    def holds(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Say whether oneDNN may multiply by the weight; compare products if that is unknown."""
        threads = torch.get_num_threads()
        if threads in self._wrong:
            return False
        key = threads, weight.shape, bias is not None
        if key not in self._found:
            fewer = openmp.may_give_fewer()
            self._found[key] = not fewer and _is_right(weight, bias)
            if not self._found[key]:
                self._wrong.add(threads)
                why = "OpenMP may give fewer" if fewer else "oneDNN multiplies wrongly"
                number = f"{threads} thread{'s' * (threads > 1)}"
                self._say(f"  linear layers by torch, not oneDNN: with {number} {why}")
        return self._found[key]


@torch.no_grad()
def _is_right(weight: Tensor, bias: Tensor | None) -> bool:
    """Say whether oneDNN's product with some inputs is torch's, but for rounding."""
    if not weight.numel():
        return True
    generator = torch.Generator().manual_seed(0)
    size = math.sqrt(weight.shape[1]) * weight.norm(dim=1)
    for rows in _ROWS:
        if rows > max(1, _MOST // weight.shape[0]):
            break
        x = torch.randn(rows, weight.shape[1], generator=generator, dtype=weight.dtype)
        # What is left out is then not a number, rather than what happened to lie there.
        torch.full((rows, weight.shape[0]), math.nan, dtype=weight.dtype)
        found, wanted = _product(x, weight, bias), F.linear(x, weight, bias)
        allowed = _TOLERANCE * x.norm(dim=1, keepdim=True) * size
        if bias is not None:
            allowed += _TOLERANCE * bias.abs()
        is_near = (found - wanted).abs() <= allowed
        if not (is_near | ~wanted.isfinite()).all():
            return False
    return True

"""ElasticZO-INT8: train a small network of int8 weights in integers alone (arXiv 2501.04287).

A class for users of the library: it trains no language model, so there is no method=elasticzo_int8.

    net = IntegerNetwork.drawn([3, 32, 32, 2], seed=0)
    opt = ElasticZOInt8(net, tail_layers=1, seed=0)
    record = opt.step(x, labels)    # x int8 (rows, 3), labels int64 (rows,)

No float is computed from the input to the written weights.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from smezo_cli.zo.noise import hash64, stream_key
from smezo_cli.zo.targets import check

LARGEST = 127  # of a code; -128 is left out, so that codes are symmetric
FRACTION = 16  # bits behind the point of a logit and of a loss, both in units of log 2
ONE_BITS = 30  # 1 << ONE_BITS is 1 where powers of two are meant
_ONE = 1 << ONE_BITS
_LOG2_E = 94548  # log2(e) << FRACTION, rounded
_MOST_SUMMED = (1 << 31) // LARGEST**2  # products of two codes whose sum an int32 holds


# --- integer arithmetic ------------------------------------------------------------------------


def _roots() -> list[int]:
    """Return 2**-(1/2), 2**-(1/4), .. as many as FRACTION, by integer roots."""
    found, value = list[int](), _ONE >> 1
    for _ in range(FRACTION):
        value = math.isqrt(value << ONE_BITS)
        found.append(value)
    return found


_ROOTS = _roots()


def nearest(x: Tensor, shift: int) -> Tensor:
    """Return x / 2**shift, rounded to nearest; halves go up."""
    return (x + (1 << (shift - 1))) >> shift if shift else x


def by_chance(x: Tensor, shift: int, bits: Tensor) -> Tensor:
    """Return x / 2**shift as one of its two neighbours, right on average.

    Args:
        x: int64.
        shift: 0 to 62.
        bits: int64 of random bits, of x's shape.
    """
    return (x + (bits & ((1 << shift) - 1))) >> shift


def half_to(x: Tensor) -> Tensor:
    """Return 2**-x in units of 2**-ONE_BITS: x int64 in units of 2**-FRACTION, not negative."""
    out = torch.full_like(x, _ONE)
    for i, root in enumerate(_ROOTS):
        is_set = (x >> (FRACTION - 1 - i)) & 1 == 1
        out = torch.where(is_set, (out * root) >> ONE_BITS, out)
    return out >> (x >> FRACTION).clamp(max=62)


def log2(x: Tensor) -> Tensor:
    """Return log2 in units of 2**-FRACTION, rounded down.

    Args:
        x: int64 in units of 2**-ONE_BITS, at least 1 and below 2**32.
    """
    out = torch.zeros_like(x)
    for shift in (16, 8, 4, 2, 1):
        is_more = x >= _ONE << shift
        out += is_more.long() * (shift << FRACTION)
        x = torch.where(is_more, x >> shift, x)
    for i in range(FRACTION):  # the square of 2**f in [1, 2) says the next bit of f
        x = (x * x) >> ONE_BITS
        is_more = x >= 2 * _ONE
        out += is_more.long() << (FRACTION - 1 - i)
        x = torch.where(is_more, x >> 1, x)
    return out


@dataclass(frozen=True)
class Scaled:
    """Holds numbers as int8 codes: code times 2**exponent."""

    codes: Tensor
    exponent: int


def narrowed(total: Tensor, exponent: int) -> Scaled:
    """Return int32 sums as codes, shifted by as few bits as the largest needs.

    They are rounded to nearest, and not by chance: so what the losses of two points differ by comes
    from the weights, and not from rounding.
    """
    shift = max(0, int(total.abs().max()).bit_length() - 7)
    codes = nearest(total, shift).clamp(-LARGEST, LARGEST).to(torch.int8)
    return Scaled(codes, exponent + shift)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in int32, of int8 matrices."""
    return a.to(torch.int32) @ b.to(torch.int32)


def below_the_largest(logits: Scaled) -> Tensor:
    """Return how far each logit is below the largest of its row, in log 2: int64, FRACTION bits."""
    far = (logits.codes.amax(1, keepdim=True).long() - logits.codes) * _LOG2_E
    if logits.exponent < 0:
        return nearest(far, min(-logits.exponent, 62))
    return far << min(logits.exponent, 38)  # 254 log2(e) of it fill 63 bits


def cross_entropy(logits: Scaled, labels: Tensor) -> int:
    """Return the cross-entropy summed over rows, in units of 2**-FRACTION log 2."""
    far = below_the_largest(logits)
    losses = log2(half_to(far).sum(1)) + far.gather(1, labels[:, None])[:, 0]
    return int(losses.sum())


def errors(logits: Scaled, labels: Tensor) -> Tensor:
    """Return 127 times the gradient of each row's cross-entropy by its logits: int8."""
    powers = half_to(below_the_largest(logits))
    total = powers.sum(1, keepdim=True)
    found = (2 * LARGEST * powers + total) // (2 * total)  # rounded to nearest
    found.scatter_add_(1, labels[:, None], torch.full_like(labels, -LARGEST)[:, None])
    return found.to(torch.int8)


# --- the network and its steps -----------------------------------------------------------------


class IntegerNetwork(nn.Module):
    """Chains linear layers of int8 codes with ReLU between them, and no biases.

    Sums are int32, and are shifted to int8 between layers; each tensor has one power of two as its
    scale. A constant column of the input takes the place of biases.

    Args:
        weights: int8 (out, in) of each layer, in -127..127.
        exponents: of the scale of each layer's weights.

    Raises:
        ValueError: the layers do not fit together, or a sum might not fit an int32.
    """

    def __init__(self, weights: Sequence[Tensor], exponents: Sequence[int]) -> None:
        super().__init__()
        check(0 < len(weights) == len(exponents), "give one exponent for each layer")
        for i, weight in enumerate(weights):
            check(weight.dtype == torch.int8 and weight.dim() == 2, f"layer {i}: int8 (out, in)")
            check(weight.shape[1] <= _MOST_SUMMED, f"layer {i}: at most {_MOST_SUMMED:,} inputs")
            self.register_buffer(f"weight{i}", weight)
        for i, (one, other) in enumerate(pairwise(weights)):
            check(
                one.shape[0] == other.shape[1],
                f"layer {i + 1} takes {other.shape[1]} numbers, and layer {i} gives {one.shape[0]}",
            )
        self.exponents = list(exponents)

    @classmethod
    def drawn(cls, sizes: Sequence[int], seed: int = 0) -> "IntegerNetwork":
        """Return a network of random weights, uniform up to about 1 / sqrt(inputs).

        Args:
            sizes: numbers of the input, of each hidden layer, and of classes.
            seed: names the weights.
        """
        weights, exponents = [], []
        for i, (fan_in, out) in enumerate(pairwise(sizes)):
            bits = hash64(torch.arange(out * fan_in), stream_key(seed, "weights", i))
            codes = (((bits >> 33) & 0x7FFFFFFF) * 129 >> 31) - 64
            weights.append(codes.to(torch.int8).view(out, fan_in))
            exponents.append(-6 - (fan_in.bit_length() + 1) // 2)
        return cls(weights, exponents)

    @property
    def weights(self) -> list[Tensor]:
        """Return the codes of each layer."""
        return [self.get_buffer(f"weight{i}") for i in range(len(self.exponents))]

    def layer(self, i: int, x: Scaled, weight: Tensor) -> Scaled:
        """Return what a layer makes of its input with these weights in place of its own."""
        total = matmul(x.codes, weight.T)
        if i + 1 < len(self.exponents):
            total = total.clamp(min=0)
        return narrowed(total, x.exponent + self.exponents[i])

    def forward(
        self, x: Scaled, moved: Callable[[int, Tensor], Tensor] = lambda i, weight: weight
    ) -> Scaled:
        """Return the logits.

        Args:
            x: (rows, inputs).
            moved: returns the weights to take for those of a layer, layer by layer.
        """
        for i, weight in enumerate(self.weights):
            x = self.layer(i, x, moved(i, weight))
        return x


@dataclass(frozen=True)
class IntegerStep:
    """Says what a step measured.

    Attributes:
        plus: cross-entropy of the batch on one side, summed, in units of 2**-FRACTION log 2.
        minus: on the other.
    """

    plus: int
    minus: int

    @property
    def sign(self) -> int:
        """Return the sign of the difference: 1, 0 or -1."""
        return (self.plus > self.minus) - (self.plus < self.minus)


class ElasticZOInt8:
    """Train the last layers by integer backpropagation, and those before by signs of differences.

    One step at int8 weights (theta, phi), phi those of the last ``tail_layers`` layers:

        z = m u,  m = 1 with chance 1 - sparsity, u = -r..-1, 1..r with equal chances
        s = sign[L(theta + z, phi) - L(theta - z, phi)]
        theta <- theta - round(s z / 2^update_shift)
        phi <- phi - round(grad_phi L / 2^k),  k such that the largest is below 2^tail_bits

    theta +- z and all weights are cut to -127..127. L is a sum over rows in fixed point: powers and
    logarithms of two by shifts, products and integer roots. Nothing is kept but the weights, one
    byte each; a layer at a time is widened (to int32, and to int64 where noise is drawn). Forwards
    a step: 2 and one for the tail, at the weights, whose activations are kept as int8.

    Of the paper are: ternary or sparse integer noise, the sign of an integer cross-entropy's
    difference, rounded updates, and integer backpropagation in the tail. How each is computed is
    our choice, and so are the defaults: activations are rounded to nearest (see :func:`narrowed`);
    updates by keyed chance, because most are below one half, which nearest would lose, and chance
    taken from the bits that are shifted out is biased where they are few, as those of z are. The
    tail's gradient is that at the weights, as in :class:`smezo_cli.methods.elasticzo.ElasticZO`.

    Args:
        network: is trained.
        tail_layers: last layers that are trained by backpropagation; 0: none, all by signs.
        largest: r; 1 is ternary noise.
        sparsity: fraction of the weights NOT perturbed, in [0, 1).
        update_shift: a perturbed weight moves by about z / 2^update_shift, 0 to 16.
        tail_bits: a weight of the tail moves by less than 2^tail_bits + 1, -8 to 7.
        input_exponent: of the scale of the input's codes.
        seed: names the noise.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        network: IntegerNetwork,
        *,
        tail_layers: int = 1,
        largest: int = 7,
        sparsity: float = 0.5,
        update_shift: int = 0,
        tail_bits: int = 2,
        input_exponent: int = -6,
        seed: int = 0,
    ) -> None:
        count = len(network.exponents)
        check(0 <= tail_layers <= count, f"tail_layers={tail_layers}: 0 to {count}")
        check(1 <= largest <= LARGEST, f"largest={largest}: 1 to {LARGEST}")
        check(0 <= sparsity < 1, f"sparsity={sparsity}: the fraction NOT perturbed, in [0, 1)")
        check(0 <= update_shift <= 16, f"update_shift={update_shift}: 0 to 16")
        check(-8 <= tail_bits <= 7, f"tail_bits={tail_bits}: -8 to 7")
        self.network, self.trunk = network, count - tail_layers
        self.largest, self.sparsity = largest, sparsity
        self.update_shift, self.tail_bits = update_shift, tail_bits
        self.input_exponent, self.seed, self.num_steps = input_exponent, seed, 0
        self._rests_below = round(sparsity * (1 << 31))

    def _bits(self, purpose: str, layer: int, weight: Tensor) -> Tensor:
        """Return the step's 64 random bits of each weight of a layer."""
        key = stream_key(self.seed, purpose, self.num_steps, 0, f"weight{layer}")
        counter = torch.arange(weight.numel(), device=weight.device)
        return hash64(counter, key).view(weight.shape)

    def perturbation(self, layer: int) -> Tensor:
        """Return z of the next step for a layer: int8."""
        bits = self._bits("z", layer, self.network.weights[layer])
        size = 1 + (((bits >> 32) & 0x3FFFFFFF) * self.largest >> 30)
        signed = torch.where(bits < 0, -size, size)
        return (signed * ((bits & 0x7FFFFFFF) >= self._rests_below)).to(torch.int8)

    def _loss(self, x: Scaled, labels: Tensor, side: int) -> int:
        def moved(i: int, weight: Tensor) -> Tensor:
            return _less(weight, -side * self.perturbation(i)) if i < self.trunk else weight

        return cross_entropy(self.network(x, moved), labels)

    def logits(self, x: Tensor) -> Scaled:
        """Return the logits of rows (int8)."""
        found: Scaled = self.network(Scaled(x, self.input_exponent))
        return found

    def step(self, x: Tensor, labels: Tensor) -> IntegerStep:
        """Make one step on a batch.

        Args:
            x: int8 (rows, inputs).
            labels: int64 (rows,), below the number of classes.

        Raises:
            ValueError: the batch is empty or too long, or not of these dtypes.
        """
        check(x.dtype == torch.int8 and labels.dtype == torch.int64, "x: int8; labels: int64")
        check(0 < len(x) <= _MOST_SUMMED, f"{len(x)} rows: 1 to {_MOST_SUMMED:,}")
        data = Scaled(x, self.input_exponent)
        found = IntegerStep(self._loss(data, labels, 1), self._loss(data, labels, -1))
        gradients = self._tail_gradients(data, labels)
        for i, weight in enumerate(self.network.weights):
            if i < self.trunk:
                change, shift = self.perturbation(i).long() * found.sign, self.update_shift
            else:
                change = gradients[i - self.trunk].long()
                shift = max(0, int(change.abs().max()).bit_length() - self.tail_bits)
            weight.copy_(_less(weight, by_chance(change, shift, self._bits("round", i, weight))))
        self.num_steps += 1
        return found

    def _tail_gradients(self, x: Scaled, labels: Tensor) -> list[Tensor]:
        """Return the gradient of each layer of the tail, in int32 and up to a power of two."""
        weights, inputs, found = self.network.weights, list[Scaled](), list[Tensor]()
        if self.trunk == len(weights):
            return found
        for i, weight in enumerate(weights):
            if i >= self.trunk:
                inputs.append(x)
            x = self.network.layer(i, x, weight)
        error = errors(x, labels)
        for i in reversed(range(self.trunk, len(weights))):
            here = inputs[i - self.trunk].codes
            found.append(matmul(error.T, here))
            if i > self.trunk:
                error = narrowed(matmul(error, weights[i]) * (here > 0), 0).codes
        return found[::-1]


def _less(weight: Tensor, change: Tensor) -> Tensor:
    """Return int8 weights less a change, cut to what a code holds."""
    return (weight.to(torch.int32) - change).clamp(-LARGEST, LARGEST).to(torch.int8)

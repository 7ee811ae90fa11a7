"""Make passes in plain torch, chunk by chunk: the reference of all others."""

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from smezo_cli.zo import noise
from smezo_cli.zo.passes.draw import Draw, Numbers, Rule
from smezo_cli.zo.rounding import ROUNDINGS
from smezo_cli.zo.selections.masks import RULES


def chunk_size(device: torch.device) -> int:
    """Return how many weights, or pairs of them, are computed together."""
    # On a CPU the temporaries stay in the second-level cache (and below the size at which torch
    # splits an operation over threads); a GPU wants few launches.
    return 1 << 15 if device.type == "cpu" else 1 << 22


def blend(
    weight: Tensor,
    direction: Tensor,
    mask: Tensor,
    bits: Tensor | None,
    draw: Draw,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weights plus the direction less the draw's decay where the mask is True, rounded.

    Args:
        weight: any dtype and shape.
        direction: float32, likewise shaped.
        mask: bool.
        bits: 31 random bits an entry for stochastic rounding; None: to nearest.
        draw: of the pass; its decay is read.
        dtype: of what is returned.
    """
    w = weight.to(torch.float32)
    if draw.decay is not None:
        direction = direction - draw.decay * w
    value = w + direction
    if bits is not None and dtype in ROUNDINGS:
        value = ROUNDINGS[dtype](value, bits)
    # where, not + mask * x: an unmasked weight keeps its bits, -0.0 included.
    return torch.where(mask, value.to(dtype), weight.to(dtype))


def sum_of_draws(counter: Tensor, rule: Rule, draw: Draw) -> tuple[Tensor, Tensor]:
    """Return sum_q a_q z_q for both elements of each pair."""
    first, second = noise.pair(counter, draw.keys[0], rule.noise)
    first, second = first * draw.coefficients[0], second * draw.coefficients[0]
    for q in range(1, draw.keys.shape[0]):
        z_first, z_second = noise.pair(counter, draw.keys[q], rule.noise)
        first = first + z_first * draw.coefficients[q]
        second = second + z_second * draw.coefficients[q]
    return first, second


#: A number for each of the first elements of some pairs, and for each of the second.
Pair = Tensor | tuple[Tensor, Tensor]

_Drawn = TypeVar("_Drawn", Draw, Numbers)


def of_draws(draw: _Drawn, pair: Callable[[_Drawn], Pair], fold: "Fold | None") -> Pair:
    """Return sum_q a_q z_q for both elements of some pairs, or what ``fold`` makes of the draws.

    Args:
        draw: of all queries.
        pair: returns the sum of a draw, of all queries or of one.
        fold: see :meth:`EagerPasses.along`.
    """
    if fold is None:
        return pair(draw)
    alone = (
        draw._replace(keys=draw.keys[q : q + 1], coefficients=draw.coefficients[q : q + 1])
        for q in range(len(draw.keys))
    )
    found = (pair(d) for d in alone)
    return fold(x if isinstance(x, Tensor) else torch.stack(x) for x in found)


def _masks(
    first: Tensor, second: Tensor, counter: Tensor, rule: Rule, draw: Draw
) -> tuple[Tensor, Tensor]:
    """Return True where perturbed, for both elements of each pair."""
    is_active = RULES[rule.mask]
    if rule.mask == "random":
        u_first, u_second = noise.uniform_pair(counter, draw.mask_key)
        return is_active(u_first, draw.h), is_active(u_second, draw.h)
    magnitudes = first.to(torch.float32).abs(), second.to(torch.float32).abs()
    return is_active(magnitudes[0], draw.h), is_active(magnitudes[1], draw.h)


def round_bits(counter: Tensor, rule: Rule, draw: Draw) -> tuple[Tensor | None, Tensor | None]:
    """Return 31 random bits for both elements of each pair, where rounding is stochastic."""
    if not rule.stochastic:
        return None, None
    return noise.rounding_pair(counter, draw.round_key)


def move_pairs(
    first: Tensor,
    second: Tensor,
    out_first: Tensor,
    out_second: Tensor,
    counter: Tensor,
    rule: Rule,
    draw: Draw,
) -> None:
    """Move pairs (i, i + pairs), written to the out tensors (which may be the inputs)."""
    directions = sum_of_draws(counter, rule, draw)
    active = _masks(first, second, counter, rule, draw)
    bits = round_bits(counter, rule, draw)
    dtype = out_first.dtype
    moved = blend(first, directions[0], active[0], bits[0], draw, dtype)
    out_second.copy_(blend(second, directions[1], active[1], bits[1], draw, dtype))
    out_first.copy_(moved)


def move_pairs_both(
    first: Tensor,
    second: Tensor,
    plus: tuple[Tensor, Tensor],
    minus: tuple[Tensor, Tensor],
    counter: Tensor,
    rule: Rule,
    draw: Draw,
) -> None:
    """Do as :func:`move_pairs` for the draw and for the one with its coefficients negated.

    Negation is exact, so that these are the bits of two passes; rounds to nearest.
    """
    there = sum_of_draws(counter, rule, draw)
    active = _masks(first, second, counter, rule, draw)
    for (out_first, out_second), (a, b) in ((plus, there), (minus, (-there[0], -there[1]))):
        out_second.copy_(blend(second, b, active[1], None, draw, out_second.dtype))
        out_first.copy_(blend(first, a, active[0], None, draw, out_first.dtype))


def move_at(weight: Tensor, index: Tensor, numel: int | Tensor, rule: Rule, draw: Draw) -> Tensor:
    """Move entries picked by flat index: equal to the same entries of the whole pass.

    Args:
        weight: the picked entries, any shape.
        index: int64, their flat indices in the whole tensor, the same shape.
        numel: entries of the whole tensor.
        rule: what is fixed for the run.
        draw: what this pass needs.

    Returns:
        The moved entries in the weight's dtype and shape.
    """
    counter, is_first = noise.locate(index, numel)
    directions = sum_of_draws(counter, rule, draw)
    active = _masks(weight, weight, counter, rule, draw)
    bits = round_bits(counter, rule, draw)
    own_bits = None
    if bits[0] is not None and bits[1] is not None:
        own_bits = torch.where(is_first, bits[0], bits[1])
    direction = torch.where(is_first, directions[0], directions[1])
    mask = torch.where(is_first, active[0], active[1])
    return blend(weight, direction, mask, own_bits, draw, weight.dtype)


class EagerPasses:
    """Make the passes in plain torch, chunk by chunk."""

    name = "eager"
    reads_numbers = False  # but tensors on the device

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def move(self, weight: Tensor, out: Tensor, draw: Draw) -> None:
        """Write the moved ``weight`` to ``out`` (both flat, equally long; may be the same)."""

        def one(first: slice, second: slice, counter: Tensor) -> None:
            move_pairs(
                weight[first], weight[second], out[first], out[second], counter, self.rule, draw
            )

        _over_pairs(weight, one)

    def move_both(self, weight: Tensor, plus: Tensor, minus: Tensor, draw: Draw) -> None:
        """Write the weight moved by the draw and by its negative, from one draw (no decay)."""

        def one(first: slice, second: slice, counter: Tensor) -> None:
            outs = (plus[first], plus[second]), (minus[first], minus[second])
            move_pairs_both(weight[first], weight[second], *outs, counter, self.rule, draw)

        _over_pairs(weight, one)

    def move_at(self, weight: Tensor, index: Tensor, numel: int, draw: Draw) -> Tensor:
        """See :func:`move_at`."""
        return move_at(weight, index, numel, self.rule, draw)

    def noise_and_mask(self, weight: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return z of the first query (float32) and the mask (bool), as long as the flat weight."""
        z = torch.empty_like(weight, dtype=torch.float32)
        mask = torch.empty_like(weight, dtype=torch.bool)

        def one(first: slice, second: slice, counter: Tensor) -> None:
            z[second], last = noise.pair(counter, draw.keys[0], self.rule.noise)[::-1]
            z[first] = last
            active = _masks(weight[first], weight[second], counter, self.rule, draw)
            mask[second], mask[first] = active[1], active[0]

        _over_pairs(weight, one)
        return z, mask

    def mask_of(self, weight: Tensor, draw: Draw) -> Tensor:
        """Return the mask (bool) of a flat weight."""
        mask = torch.empty_like(weight, dtype=torch.bool)

        def one(first: slice, second: slice, counter: Tensor) -> None:
            active = _masks(weight[first], weight[second], counter, self.rule, draw)
            mask[second], mask[first] = active[1], active[0]

        _over_pairs(weight, one)
        return mask

    def along(self, weight: Tensor, draw: Draw, use: "Use", fold: "Fold | None" = None) -> None:
        """Call ``use`` for the parts of a flat tensor, each with its sum_q a_q z_q.

        Parts are disjoint, come in any order and in several threads, and fit the cache, so that an
        update that is more than a sum needs no memory of the tensor's size. ``fold`` takes the
        a_q z_q of a part one by one, (..., n), and returns what takes the place of their sum.
        """

        def one(first: slice, second: slice, counter: Tensor) -> None:
            directions = of_draws(draw, lambda d: sum_of_draws(counter, self.rule, d), fold)
            bits = round_bits(counter, self.rule, draw)
            use(first, directions[0], bits[0])
            if second != first:  # an odd last entry is both
                use(second, directions[1], bits[1])

        _over_pairs(weight, one)

    @staticmethod
    def move_kept(weight: Tensor, out: Tensor, z: Tensor, mask: Tensor, draw: Draw) -> None:
        """Do as :meth:`move`, from a kept z (one query, round to nearest)."""

        def one(part: slice) -> None:
            direction = z[part] * draw.coefficients[0]
            out[part] = blend(weight[part], direction, mask[part], None, draw, out.dtype)

        over_chunks(weight.numel(), weight.device, one)

    @staticmethod
    def along_kept(z: Tensor, draw: Draw, use: "Use") -> None:
        """Do as :meth:`along`, from a kept z (one query, round to nearest)."""

        def one(part: slice) -> None:
            use(part, z[part] * draw.coefficients[0], None)

        over_chunks(z.numel(), z.device, one)


def over_chunks(
    length: int, device: torch.device, one: Callable[[slice], None], chunk: int | None = None
) -> None:
    """Call ``one`` for slices of [0, length), on a CPU in as many threads as torch has.

    Chunks are too small for torch's own threads, and its operators release the interpreter.
    """
    chunk = chunk or chunk_size(device)
    parts = [slice(i, min(i + chunk, length)) for i in range(0, length, chunk)]
    threads = min(torch.get_num_threads(), len(parts)) if device.type == "cpu" else 1

    def share(k: int) -> None:
        with torch.no_grad():  # the flag is a thread's own
            for part in parts[k::threads]:
                one(part)

    if threads > 1:
        others = [_pool(threads - 1).submit(share, k) for k in range(1, threads)]
        share(0)
        for other in others:
            other.result()
    else:
        for part in parts:
            one(part)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="smezo")


def _over_pairs(weight: Tensor, one: Callable[[slice, slice, Tensor], None]) -> None:
    """Call ``one(first, second, counter)`` for chunks of pairs.

    An odd last entry comes as both the first and the second of its pair: write ``second`` first.
    """
    pairs, device = weight.numel() // 2, weight.device

    def whole(part: slice) -> None:
        counter = torch.arange(part.start, part.stop, dtype=torch.int64, device=device)
        one(part, slice(pairs + part.start, pairs + part.stop), counter)

    over_chunks(pairs, device, whole)
    if weight.numel() % 2:
        last = slice(2 * pairs, 2 * pairs + 1)
        one(last, last, torch.tensor([pairs], dtype=torch.int64, device=device))


#: Takes a part of a flat tensor, sum_q a_q z_q there (float32), and what rounds it by chance.
Use = Callable[[slice, Tensor, Tensor | None], None]

#: Takes the a_q z_q of some weights, (..., n) each, in their order; returns what to use of them.
Fold = Callable[[Iterable[Tensor]], Tensor]

"""Keyed noise: standard normal, no link between streams, the same in whatever way it is drawn."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from smezo_cli.zo import noise

pytestmark = pytest.mark.usefixtures("one_thread")

# Every statistic below is that of fixed keys, so a test that passes once passes always. Bounds are
# five standard errors of the statistic: a right generator with other keys exceeds one of them in
# some 6e-7 of all cases.
SIGMAS = 5.0


def key_of(*parts: int | str) -> Tensor:
    return torch.tensor(noise.stream_key(*parts), dtype=torch.int64)


def normals(count: int, *parts: int | str, kind: str = "gaussian") -> Tensor:
    """The ``count`` draws of a tensor of that size, as float64."""
    return noise.draw(torch.arange(count), count, key_of(*parts), kind).double()


def signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word."""
    return word - (1 << 64) if word >= 1 << 63 else word


# ------------------------------------------------------------------------------- one distribution


@pytest.mark.parametrize("half", ["first", "second"])
def test_moments_to_the_sixth_are_those_of_the_normal(half: str) -> None:
    """E z**k for k = 1..6 is 0, 1, 0, 3, 0, 15 within the sampling error of 2**21 draws."""
    counters = torch.arange(1 << 21)
    first, second = noise.pair(counters, key_of("moments"), "gaussian")
    z = (first if half == "first" else second).double()
    expected = {0: 1, 2: 1, 4: 3, 6: 15, 8: 105, 10: 945, 12: 10395}
    for k in range(1, 7):
        mean = expected.get(k, 0)
        error = math.sqrt((expected[2 * k] - mean**2) / z.numel())
        assert abs((z**k).mean().item() - mean) < SIGMAS * error, f"moment {k}"


@pytest.mark.parametrize("seed", [0, 1])
def test_kolmogorov_smirnov_against_the_normal(seed: int) -> None:
    """The largest gap between 2**21 draws and the normal distribution is that of normal draws."""
    z = normals(1 << 21, seed, "ks").sort().values
    cumulative = torch.special.ndtr(z)
    n = z.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    gap = max((steps[1:] - cumulative).max().item(), (cumulative - steps[:-1]).max().item())
    # Kolmogorov's asymptotic critical value at a risk of 1e-6: sqrt(ln(2 / risk) / 2).
    assert gap * math.sqrt(n) < math.sqrt(math.log(2 / 1e-6) / 2)


@pytest.mark.parametrize("bound", [2.0, 3.0, 4.0, 4.5])
def test_the_tails_hold_as_many_draws_as_the_normal(bound: float) -> None:
    """The count beyond +bound and beyond -bound is binomial with the normal's tail probability."""
    z = normals(1 << 22, "tails")
    expected = z.numel() * 0.5 * math.erfc(bound / math.sqrt(2))
    for beyond in ((z > bound).sum().item(), (z < -bound).sum().item()):
        assert abs(beyond - expected) < SIGMAS * math.sqrt(expected)


@pytest.mark.parametrize("bound", [1e-2, 1e-3, 1e-4, 1e-5])
def test_as_many_draws_are_next_to_zero_as_of_the_normal(bound: float) -> None:
    """No hole and no heap at zero, where the angle is a quarter turn or the radius short."""
    counters = torch.arange(1 << 22)
    for z in noise.pair(counters, key_of("zero"), "gaussian"):
        expected = z.numel() * math.erf(bound / math.sqrt(2))
        assert abs((z.abs() < bound).sum().item() - expected) < SIGMAS * math.sqrt(expected)


def test_one_element_is_normal_over_the_keys_of_many_steps() -> None:
    """Moments of the same few elements over 4,000 steps: short streams are as good as long ones."""
    keys = torch.tensor([noise.stream_key(0, "z", step, 0, "w") for step in range(4000)]).T
    z = torch.stack(noise.pair(torch.arange(16)[:, None], keys, "gaussian")).double()
    for k, (mean, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        error = math.sqrt(variance / z.numel())
        assert abs((z**k).mean().item() - mean) < SIGMAS * error, f"moment {k}"
        per_element = (z**k).mean(-1)
        assert (per_element - mean).abs().max().item() < SIGMAS * math.sqrt(variance / 4000)


@pytest.mark.parametrize("shift", [0, 16, 32, 48, 52])
def test_hash_bits_fill_their_bins_evenly(shift: int) -> None:
    """Chi-square of 4,096 bins of 12 bits at the low end, the middle and the high end."""
    bits = noise.hash64(torch.arange(1 << 20), key_of("chi-square"))
    counts = torch.bincount((bits >> shift) & 0xFFF, minlength=1 << 12).double()
    expected = bits.numel() / counts.numel()
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = counts.numel() - 1
    # Both sides: a counter that shines through fills bins too evenly.
    assert abs(statistic - freedom) < SIGMAS * math.sqrt(2 * freedom)


def test_every_hash_bit_is_balanced_and_no_two_bits_agree() -> None:
    """Each of 64 bits is set in half of the words; each pair of bits is equal in half of them."""
    n = 1 << 16
    bits = noise.hash64(torch.arange(n), key_of("bits"))
    signs = torch.stack([((bits >> k) & 1).double() * 2 - 1 for k in range(64)])
    assert signs.mean(1).abs().max().item() < SIGMAS / math.sqrt(n)
    products = (signs @ signs.T / n).fill_diagonal_(0)
    assert products.abs().max().item() < SIGMAS / math.sqrt(n)


def test_one_bit_of_the_counter_turns_half_of_the_bits() -> None:
    """Avalanche: flipping any counter bit flips every output bit with probability 1/2."""
    n = 1 << 14
    counters, key = torch.arange(n), key_of("avalanche")
    plain = noise.hash64(counters, key)
    for k in range(40):  # more than any tensor has entries
        turned = plain ^ noise.hash64(counters ^ (1 << k), key)
        share = torch.stack([((turned >> j) & 1).double().mean() for j in range(64)])
        # n / 2: a counter and its neighbour may both be there and give the same word.
        assert (share - 0.5).abs().max().item() < SIGMAS * 0.5 / math.sqrt(n / 2)


def test_uniforms_are_even_multiples_of_two_to_the_minus_24() -> None:
    """Both uniforms lie on the grid of [0, 1), fill 256 bins evenly and are uncorrelated."""
    n = 1 << 20
    pair = noise.uniform_pair(torch.arange(n), key_of("uniform"))
    for u in pair:
        assert u.dtype == torch.float32
        assert 0 <= u.min().item() < 1e-4 < 1 - 1e-4 < u.max().item() < 1
        assert torch.equal(u * 2**24, (u * 2**24).floor())
        counts = torch.bincount((u * 256).long(), minlength=256).double()
        statistic = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
        assert abs(statistic - 255) < SIGMAS * math.sqrt(2 * 255)
    a, b = (u.double() - 0.5 for u in pair)
    assert abs((a * b).mean().item()) < SIGMAS / 12 / math.sqrt(n)


def test_rademacher_is_plus_or_minus_one_in_equal_parts() -> None:
    """Every draw is -1 or +1, each half is balanced, and the halves are uncorrelated."""
    n = 1 << 20
    first, second = noise.pair(torch.arange(n), key_of("signs"), "rademacher")
    for signs in (first, second, first * second, first[1:] * first[:-1]):
        assert torch.equal(signs.abs(), torch.ones_like(signs))
        assert abs(signs.mean().item()) < SIGMAS / math.sqrt(n)


# -------------------------------------------------------------------------------- no links between


def cross_correlations(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of a[i] with b[i + s] for every shift s (around the end), standard error 1."""
    product = torch.fft.rfft(a).conj() * torch.fft.rfft(b)
    return torch.fft.irfft(product, n=a.numel()) / math.sqrt(a.numel())


def largest(count: int) -> float:
    """What ``count`` standard normals exceed together with probability 1e-6."""
    return math.sqrt(2 * math.log(2 * count / 1e-6))


NEIGHBOURS = {
    "step": [(0, "z", 10, 0, "a.weight"), (0, "z", 11, 0, "a.weight"), (0, "z", 12, 0, "a.weight")],
    "query": [(0, "z", 10, q, "a.weight") for q in range(3)],
    "tensor": [(0, "z", 10, 0, f"layers.{n}.weight") for n in range(3)],
    "seed": [(seed, "z", 10, 0, "a.weight") for seed in range(3)],
    "purpose": [(0, purpose, 10, 0, "a.weight") for purpose in ("z", "mask", "round")],
    "digits": [(0, "z", 1, 11, "a"), (0, "z", 11, 1, "a"), (0, "z", 111, "", "a")],
}


@pytest.mark.parametrize("which", NEIGHBOURS)
@pytest.mark.parametrize("kind", noise.KINDS)
def test_streams_are_unrelated_under_every_shift(which: str, kind: str) -> None:
    """z[i] is uncorrelated with z'[i + s] of a neighbouring stream for all 2**16 shifts s."""
    n = 1 << 16
    streams = [normals(n, *parts, kind=kind) for parts in NEIGHBOURS[which]]
    for a, b in itertools.combinations(streams, 2):
        assert cross_correlations(a, b).abs().max().item() < largest(n)
        if kind == "gaussian":  # nor are their sizes, which signs would hide
            sizes = [(z**2 - 1) / math.sqrt(2) for z in (a, b)]
            # The squares' heavier tail is averaged away at this n; 1.1 allows for what is left.
            assert cross_correlations(*sizes).abs().max().item() < 1.1 * largest(n)


@pytest.mark.parametrize("kind", noise.KINDS)
def test_a_stream_is_unrelated_to_itself_under_every_shift(kind: str) -> None:
    """z[i] is uncorrelated with z[i + s] for all s but 0, across the two halves too."""
    z = normals(1 << 18, "auto", kind=kind)
    assert cross_correlations(z, z)[1:].abs().max().item() < largest(z.numel())


@pytest.mark.parametrize("lag", [0, 1])
def test_first_and_second_halves_are_independent(lag: int) -> None:
    """16 x 16 equally likely cells of (first[i], second[i + lag]) are equally full."""
    n = (1 << 20) + 1
    first, second = noise.pair(torch.arange(n), key_of("halves"), "gaussian")
    cells = [(torch.special.ndtr(z.double()) * 16).long().clamp_(0, 15) for z in (first, second)]
    joint = cells[0][: n - lag] * 16 + cells[1][lag:]
    counts = torch.bincount(joint, minlength=256).double()
    expected = (n - lag) / 256
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(statistic - 255) < SIGMAS * math.sqrt(2 * 255)


def test_neighbouring_elements_are_independent() -> None:
    """16 x 16 equally likely cells of (z[i], z[i + 1]) are equally full."""
    z = normals(1 << 20, "serial")
    cells = (torch.special.ndtr(z) * 16).long().clamp_(0, 15)
    counts = torch.bincount(cells[:-1] * 16 + cells[1:], minlength=256).double()
    expected = (z.numel() - 1) / 256
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(statistic - 255) < SIGMAS * math.sqrt(2 * 255)


def test_no_two_stream_keys_meet() -> None:
    """Neither word of the keys of 300 steps x 3 queries x 100 tensors occurs twice."""
    keys = [
        noise.stream_key(0, "z", step, query, f"model.layers.{n}.weight")
        for step in range(300)
        for query in range(3)
        for n in range(100)
    ]
    assert len({k for k, _ in keys}) == len({k for _, k in keys}) == len(keys) == 90_000


# ------------------------------------------------------------------------ however it is drawn


@pytest.mark.parametrize("kind", noise.KINDS)
@pytest.mark.parametrize("numel", [1, 2, 3, 4, 7, 64, 1001, 4096])
def test_pairs_and_draws_by_index_are_equal_bit_for_bit(kind: str, numel: int) -> None:
    """Element i is first[i], element pairs + i is second[i], an odd last one is first[pairs]."""
    key, pairs = key_of("pairs"), numel // 2
    first, second = noise.pair(torch.arange(pairs + 1), key, kind)
    whole = torch.cat([first[:pairs], second[:pairs], first[pairs : pairs + numel % 2]])
    assert torch.equal(noise.draw(torch.arange(numel), numel, key, kind), whole)


@pytest.mark.parametrize("kind", noise.KINDS)
@pytest.mark.parametrize("numel", [5000, 5001])
def test_a_draw_depends_on_its_index_alone(kind: str, numel: int) -> None:
    """Chunks, subsets, repeats, another order and another shape draw the same values."""
    key = key_of("subset")
    index = torch.arange(numel)
    whole = noise.draw(index, numel, key, kind)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(numel, generator=generator)
    some = torch.randint(numel, (37, 11), generator=generator)
    assert torch.equal(noise.draw(order, numel, key, kind), whole[order])
    assert torch.equal(noise.draw(some, numel, key, kind), whole[some])
    chunks = [noise.draw(part, numel, key, kind) for part in index.split(97)]
    assert torch.equal(torch.cat(chunks), whole)
    assert torch.equal(noise.draw(some, torch.tensor(numel), key, kind), whole[some])


def test_no_global_generator_is_read_or_moved() -> None:
    """The draws ignore torch's seed and leave its state as it was."""
    torch_state = torch.random.get_rng_state()
    before = normals(100, "global")
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        assert torch.equal(normals(100, "global"), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", noise.KINDS)
def test_a_gpu_draws_the_same_bits(kind: str) -> None:
    """The draws on a CUDA device equal those on the CPU bit for bit."""
    index, key = torch.arange(1_000_001), key_of("device")
    there = noise.draw(index.cuda(), index.numel(), key.cuda(), kind)
    assert torch.equal(there.cpu(), noise.draw(index, index.numel(), key, kind))


# ------------------------------------------------------------------- against an independent account

M1, M2, WORD = 0x3C79AC492BA7B653, 0x1C69B3F74AC4AE35, (1 << 64) - 1


def python_hash(counter: int, key: tuple[int, int]) -> int:
    """The documented mixer on Python's integers: the unsigned 64-bit word."""
    x = (counter ^ key[0]) & WORD
    x = ((x ^ x >> 27) * M1) & WORD
    x ^= key[1] & WORD
    x = ((x ^ x >> 33) * M2) & WORD
    return x ^ x >> 27


def counter_of(word: int, key: tuple[int, int]) -> int:
    """The counter whose hash is ``word``: the mixer backwards."""

    def undo_shift(x: int, k: int) -> int:
        y = x
        for _ in range(64 // k):
            y = x ^ y >> k
        return y

    x = undo_shift(word, 27)
    x = undo_shift(x * pow(M2, -1, 1 << 64) & WORD, 33) ^ (key[1] & WORD)
    x = undo_shift(x * pow(M1, -1, 1 << 64) & WORD, 27)
    return signed(x ^ (key[0] & WORD))


def test_the_hash_is_the_documented_one() -> None:
    """hash64 equals the same mixer written with Python's integers, for any counter and key."""
    for parts in (("a",), ("b", 7)):
        key = noise.stream_key(*parts)
        counters = [*range(50), 2**31, 2**40 + 3, -1, -(2**63)]
        got = noise.hash64(torch.tensor(counters), torch.tensor(key)).tolist()
        assert got == [signed(python_hash(c, key)) for c in counters]


def test_gaussians_are_box_muller_at_the_extremes_too() -> None:
    """Both draws equal sqrt(-2 ln u) times cos and sin of pi w, for ordinary and extreme bits."""
    key = noise.stream_key("extremes")
    tops = [0, 1, 2, 1 << 23, (1 << 24) - 1, 1 << 30, (1 << 31) - 2, (1 << 31) - 1]
    lows = [0, 1, 1 << 29, 1 << 30, (1 << 31) - 1, 1 << 31, 3 << 30, (1 << 32) - 1]
    words = [(top << 33) | low for top in tops for low in lows]
    words += [python_hash(c, key) for c in range(20_000)]
    counters = torch.tensor([counter_of(w, key) for w in words])
    got = torch.stack(noise.pair(counters, torch.tensor(key), "gaussian"), 1).double()
    assert torch.isfinite(got).all()
    u = torch.tensor([((w >> 33) + 0.5) / 2**31 for w in words], dtype=torch.float64)
    turns = torch.tensor([signed((w << 32) & WORD) / 2**63 for w in words], dtype=torch.float64)
    angle = math.pi * turns
    radius = (-2 * u.log()).sqrt()
    wanted = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    # Newton's root is right to 5e-6 relative, sine and cosine to 5e-8, the angle to 2**-24 pi: at
    # the largest radius 6.7 together 4e-5. Where u is next to 1 the radius (some 1e-4) is the
    # clamped root of a polynomial's error (2.3e-7) instead.
    assert (got - wanted)[u < 1 - 1e-4].abs().max().item() < 4e-5
    assert (got - wanted)[u >= 1 - 1e-4].abs().max().item() < 1e-3


GOLDEN_KEY = (-1080126146590454241, 6236407509826144308)
GOLDEN = {
    "gaussian": [
        "-0x1.fa90800000000p+0",
        "0x1.eb7a5e0000000p-1",
        "0x1.0c82380000000p-1",
        "0x1.0b87ce0000000p-1",
        "0x1.215da80000000p-5",
        "-0x1.38194e0000000p+0",
        "-0x1.762ba00000000p+0",
    ],
    "rademacher": [x.hex() for x in (-1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0)],
}


@pytest.mark.parametrize("kind", noise.KINDS)
def test_golden_values(kind: str) -> None:
    """Numbers changed: every recorded run is made of these draws; a new value breaks resuming."""
    z = noise.draw(torch.arange(7), 7, key_of(42, "z", 3, 0, "lm_head.weight"), kind)
    assert [x.hex() for x in z.tolist()] == GOLDEN[kind]


def test_golden_keys() -> None:
    """Numbers changed: the words of a key are the same on any machine and in any process."""
    assert noise.stream_key(42, "z", 3, 0, "lm_head.weight") == GOLDEN_KEY

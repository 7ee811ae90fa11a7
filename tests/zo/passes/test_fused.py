"""Passes by Numba have the bits of eager ones, in any number of threads."""

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from smezo_cli.zo.passes import by_numba, choose, kernels
from smezo_cli.zo.passes.by_numba import NumbaPasses
from smezo_cli.zo.passes.by_triton import TritonPasses
from smezo_cli.zo.passes.choose import choose_passes
from smezo_cli.zo.passes.draw import Draw, Numbers, Rule
from smezo_cli.zo.passes.eager import EagerPasses
from tests.zo.passes.test_passes import (
    BF16,
    DTYPES,
    F16,
    F32,
    SIZES,
    directions_of,
    draw_of,
    moved_by,
    same,
    weight_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Every two of (mask, noise, dtype, rounding, queries, decay) meet in some row; compiling all
# 144 combinations would take many minutes.
COMPILED = [
    ("small", "gaussian", F32, "nearest", 1, False),
    ("small", "rademacher", BF16, "stochastic", 3, True),
    ("small", "gaussian", F16, "stochastic", 1, True),
    ("large", "rademacher", F32, "nearest", 3, True),
    ("large", "gaussian", BF16, "stochastic", 1, False),
    ("large", "rademacher", F16, "nearest", 1, False),
    ("random", "rademacher", F32, "stochastic", 1, True),
    ("random", "rademacher", BF16, "nearest", 1, True),
    ("random", "gaussian", F16, "stochastic", 3, False),
]
Case = tuple[str, str, torch.dtype, str, int, bool]


@pytest.mark.parametrize("case", COMPILED, ids=lambda c: "-".join(map(str, c)))
def test_numba_passes_have_the_bits_of_eager_ones(case: Case) -> None:
    """For all sizes, into another tensor, of another dtype or in place, and for picked entries."""
    mask, kind, dtype, rounding, queries, decay = case
    rule = Rule(mask, kind, rounding == "stochastic")
    fast, eager = NumbaPasses(rule), EagerPasses(rule)
    draw = draw_of(rule, queries, decay=decay)
    for numel in SIZES:
        weight = weight_of(numel, dtype)
        wanted = moved_by(eager, weight, draw)
        assert same(moved_by(fast, weight, draw), wanted)
        g = torch.Generator().manual_seed(numel)
        index = torch.randint(numel, (97, 3), generator=g)
        assert same(fast.move_at(weight[index], index, numel, draw), wanted[index])
        fast.move(weight, weight, draw)
        assert same(weight, wanted)
    for source in DTYPES if rounding == "nearest" else [F32]:
        weight, out = weight_of(4099, source), torch.empty(4099, dtype=dtype)
        wanted = torch.empty_like(out)
        fast.move(weight, out, draw)
        eager.move(weight, wanted, draw)
        assert same(out, wanted)


def both_equal_two(worker: choose.Passes, case: Case, sizes: list[int] = SIZES) -> None:
    """One draw for both probes gives the bits of an eager pass each."""
    mask, kind, dtype, _, queries, _ = case
    rule = Rule(mask, kind)
    draw, eager = draw_of(rule, queries), EagerPasses(rule)
    back = draw._replace(coefficients=-draw.coefficients)
    for numel in sizes:
        weight = weight_of(numel, dtype)
        before, plus, minus = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
        worker.move_both(weight, plus, minus, draw)
        assert same(plus, moved_by(eager, weight, draw))
        assert same(minus, moved_by(eager, weight, back))
        assert same(weight, before)


@pytest.mark.parametrize("case", COMPILED, ids=lambda c: "-".join(map(str, c)))
@pytest.mark.parametrize("worker", [EagerPasses, NumbaPasses])
def test_both_probes_from_one_draw_have_the_bits_of_two_passes(
    worker: Callable[[Rule], choose.Passes], case: Case
) -> None:
    both_equal_two(worker(Rule(*case[:2])), case)


def test_numbers_that_are_not_stay_so_in_bfloat16() -> None:
    """A NaN or an infinity of a weight or of a move is not rounded into a number."""
    rule = Rule("large")  # perturbs what is not small, infinities with it
    weight = torch.tensor([math.nan, math.inf, -math.inf, 3.38e38] * 64).to(BF16)
    for scale in (0.05, math.inf, 1e37):
        draw = draw_of(rule, scale=scale)
        wanted, got = (moved_by(w(rule), weight, draw) for w in (EagerPasses, NumbaPasses))
        assert torch.equal(wanted.isnan(), got.isnan())
        assert same(wanted.nan_to_num(0.5), got.nan_to_num(0.5))
        NumbaPasses(rule).move(weight_ := weight.clone(), weight_, draw)
        assert torch.equal(weight_.isnan(), wanted.isnan())


@pytest.mark.parametrize("pool", ["torch's", "ours"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_threads_share_a_numba_pass(
    dtype: torch.dtype, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, two or five threads write and pick the same bits, also in place."""
    if pool == "ours":  # as where torch's OpenMP cannot be called
        monkeypatch.setattr(kernels, "in_threads", lambda *of: None)
    rule = Rule(*COMPILED[0][:2])
    draw, weight = draw_of(rule), weight_of(8 * by_numba._SHARE + 3, dtype)
    wanted, index = moved_by(EagerPasses(rule), weight, draw), torch.arange(7, weight.numel(), 3)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)  # put back by the fixture
        fast = NumbaPasses(rule)
        assert same(moved_by(fast, weight, draw), wanted)
        assert same(fast.move_at(weight[index], index, weight.numel(), draw), wanted[index])
        in_place = weight.clone()
        fast.move(in_place, in_place, draw)
        assert same(in_place, wanted)
        plus, minus = torch.empty_like(weight), torch.empty_like(weight)
        fast.move_both(weight, plus, minus, draw)
        assert same(plus, wanted)
        back = draw._replace(coefficients=-draw.coefficients)
        assert same(minus, moved_by(fast, weight, back))


def test_shares_are_parts_of_whatever_is_not_a_multiple_of_them() -> None:
    """Lengths around the alignment of a share, with more threads than there is work for."""
    rule = Rule(*COMPILED[0][:2])
    loop = kernels.in_place(rule.mask, rule.noise, None, False)
    together = kernels.in_threads(loop, 2, np.float32)
    if together is None:
        pytest.skip("torch was built without OpenMP, or its OpenMP has no GOMP_parallel")
    _, plain = NumbaPasses(rule)._last(Numbers.of(draw_of(rule)), F32)
    for pairs in (1, 15, 16, 17, 31, 33, 100, 1000):
        first, second = weight_of(2 * pairs, F32).view(2, pairs).numpy()
        wanted = first.copy(), second.copy()
        loop(*wanted, 0, *plain)
        for threads in (1, 2, 3, 7):
            there = first.copy(), second.copy()
            together(there, plain, threads)
            assert all(
                (a.view("i4") == b.view("i4")).all() for a, b in zip(there, wanted, strict=True)
            )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch may have another runtime")
def test_the_threads_are_those_of_torch() -> None:
    """A pass starts no thread where torch has its own running already."""
    code = (
        "import os, torch; from smezo_cli.zo.passes import openmp\n"
        "from smezo_cli.zo.passes.by_numba import NumbaPasses\n"
        "from smezo_cli.zo.passes.draw import Draw, Rule\n"
        "torch.set_num_threads(3); w = torch.ones(1 << 24) + 1\n"
        "key = torch.zeros(2, dtype=torch.int64); scalar = torch.zeros(())\n"
        "worker = NumbaPasses(Rule()); draw = Draw(key[None], key, key, scalar, scalar[None])\n"
        "worker.move(w[:99], w[:99], draw); w + 1\n"  # a thread of Numba's own may begin here
        "before = len(os.listdir('/proc/self/task')); worker.move(w, w, draw)\n"
        "print(openmp.find() is None, len(os.listdir('/proc/self/task')) - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if out.stdout.startswith("True"):
        pytest.skip("torch's OpenMP is not found")
    assert out.stdout.split() == ["False", "0"]


def test_numba_is_what_a_cpu_gets() -> None:
    """Numba's passes for auto and compiled, unasked-for reasons for eager ones none."""
    for backend in ("auto", "compiled"):
        chosen, why = choose_passes(Rule(), backend, torch.device("cpu"))
        assert (chosen.name, why) == ("numba", "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", COMPILED, ids=lambda c: "-".join(map(str, c)))
@pytest.mark.parametrize("worker", [EagerPasses, TritonPasses])
def test_a_gpu_pass_has_the_bits_of_the_cpu(
    case: Case, worker: Callable[[Rule], choose.Passes]
) -> None:
    """Eager and fused passes on a CUDA device equal eager passes on the CPU; picked ones, too."""
    mask, kind, dtype, rounding, queries, decay = case
    rule = Rule(mask, kind, rounding == "stochastic")
    draw = draw_of(rule, queries, decay=decay)
    there = Draw(*(None if x is None else x.cuda() for x in draw))  # type: ignore[arg-type]  # spread
    for numel in SIZES:
        weight = weight_of(numel, dtype)
        wanted = moved_by(EagerPasses(rule), weight, draw)
        assert same(moved_by(worker(rule), weight.cuda(), there).cpu(), wanted)
        index = torch.randint(numel, (97, 3), generator=torch.Generator().manual_seed(numel))
        picked = worker(rule).move_at(weight[index].cuda(), index.cuda(), numel, there)
        assert same(picked.cpu(), wanted[index])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("worker", [EagerPasses, TritonPasses])
def test_both_probes_and_directions_on_a_gpu_have_the_bits_of_the_cpu(
    worker: Callable[[Rule], choose.Passes],
) -> None:
    rule = Rule("random", stochastic=True)
    draw = draw_of(rule, 3)
    there = Draw(*(None if x is None else x.cuda() for x in draw))  # type: ignore[arg-type]  # spread
    for numel in SIZES:
        weight = weight_of(numel, BF16)
        found, wanted = torch.empty(2, numel, dtype=BF16).cuda(), torch.empty(2, numel, dtype=BF16)
        worker(rule).move_both(weight.cuda(), *found, there)
        EagerPasses(rule).move_both(weight, *wanted, draw)
        assert same(found.cpu(), wanted)
        sums, bits = directions_of(worker(rule), weight.cuda(), there)
        wanted_sums, wanted_bits = directions_of(EagerPasses(rule), weight, draw)
        assert same(sums.cpu(), wanted_sums)
        assert torch.equal(bits.cpu(), wanted_bits)

"""Masks: the threshold is an order statistic to the last bit, the share exact at the first step."""

import math

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.sparse_mezo import SparseMeZO
from smezo_cli.zo import noise
from smezo_cli.zo.passes.draw import Draw, Rule
from smezo_cli.zo.passes.eager import EagerPasses
from smezo_cli.zo.selections import masks
from smezo_cli.zo.selections.masks import RULES, kth_magnitude, threshold

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPARSITIES = [0.01, 0.1, 0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.99, 0.999]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mask_of(weight: Tensor, rule: str, h: float, name: str = "w") -> Tensor:
    """The mask that the passes make of a flat weight."""
    key = torch.tensor(noise.stream_key(0, "mask", 0, name), dtype=torch.int64)
    draw = Draw(key[None], key, key, torch.tensor(h), torch.zeros(1))
    return EagerPasses(Rule(rule)).mask_of(weight, draw)


def distinct(numel: int, dtype: torch.dtype) -> Tensor:
    """Shuffled weights of either sign, no two of one magnitude."""
    bits = 10_000 + torch.randperm(numel, generator=generator(numel))  # patterns of finite numbers
    if dtype == torch.float32:
        magnitude = (bits * 40_000).to(torch.int32).view(dtype)
    else:
        magnitude = bits.to(torch.int16).view(dtype)
    signs = torch.randint(0, 2, (numel,), generator=generator(1)) * 2 - 1
    return magnitude * signs.to(dtype)


# -------------------------------------------------------------------------- the k-th magnitude

WEIGHTS = {
    "normal": lambda n: torch.randn(n, generator=generator()),
    "tied": lambda n: torch.randint(-3, 4, (n,), generator=generator()) * 0.1,
    "signed zeros": lambda n: torch.randint(-1, 2, (n,), generator=generator()) * -0.0,
    "denormal": lambda n: torch.randint(0, 300, (n,), generator=generator()) * 1.4e-45,
    "denormal in half": lambda n: torch.randint(-300, 300, (n,), generator=generator()) * 2.0**-24,
    "huge": lambda n: torch.rand(n, generator=generator()) * 3e4 + 3e4,
    "largest": lambda n: torch.randn(n, generator=generator()).sign() * 3.3e38,
    "all scales": lambda n: torch.exp(40 * torch.randn(n, generator=generator())).clamp(max=3e38),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("numel", [1, 2, 1000])
def test_kth_magnitude_is_that_of_a_sort(kind: str, numel: int, dtype: torch.dtype) -> None:
    """For any k the value is bit for bit the k-th entry of the sorted magnitudes."""
    weight = WEIGHTS[kind](numel).to(dtype)
    weight = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)  # finite in fp16 too
    ordered = weight.abs().sort().values
    for k in {1, 2, numel // 3, numel // 2, numel - 1, numel} & set(range(1, numel + 1)):
        got = kth_magnitude(weight, k)
        assert got == float(ordered[k - 1]) == float(weight.abs().float().kthvalue(k).values)
        assert math.copysign(1, got) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kth_magnitude_over_every_finite_number(dtype: torch.dtype) -> None:
    """In 16 bits every finite number is tried, each as the k-th."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every)]
    every = every[torch.randperm(every.numel(), generator=generator())]
    ordered = every.abs().sort().values
    for k in range(1, every.numel() + 1, 997):
        assert kth_magnitude(every, k) == float(ordered[k - 1])


def test_kth_magnitude_of_more_entries_than_one_chunk_holds() -> None:
    """A tensor of several chunks, not contiguous, gives the value of a sort."""
    weight = torch.randn(1100, 1003, generator=generator()).T
    assert weight.numel() > masks.CHUNK
    ordered = weight.abs().reshape(-1).sort().values
    for k in (1, 275_825, weight.numel() // 2, weight.numel()):
        assert kth_magnitude(weight, k) == float(ordered[k - 1])


def test_a_dtype_without_masks_is_refused() -> None:
    """float64 has no bit pattern search: the error names the dtypes that have."""
    with pytest.raises(ValueError, match="float64 has no mask: float32, bfloat16, float16"):
        threshold(torch.randn(8, dtype=torch.float64), "small", 0.5)


# --------------------------------------------------------------------------- the realised share


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["small", "large"])
@pytest.mark.parametrize("numel", [2, 3, 10, 97, 1000, 4097])
def test_the_share_is_exact_at_the_first_step(rule: str, numel: int, dtype: torch.dtype) -> None:
    """At any sparsity the numel - round(sparsity * numel) smallest (largest) entries move, or 1."""
    weight = distinct(numel, dtype)
    ranks = weight.abs().argsort().argsort()  # 0 is the smallest
    for sparsity in SPARSITIES:
        perturbed = max(1, numel - round(sparsity * numel))
        mask = mask_of(weight, rule, threshold(weight, rule, sparsity))
        wanted = ranks < perturbed if rule == "small" else ranks >= numel - perturbed
        assert torch.equal(mask, wanted)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_random_mask_perturbs_each_entry_with_the_same_chance(sparsity: float) -> None:
    """The count is binomial with 1 - sparsity, in both halves, whatever the magnitudes are."""
    n = 1 << 18
    weight = torch.randn(n, generator=generator())
    mask = mask_of(weight, "random", threshold(weight, "random", sparsity)).double()
    share = 1 - sparsity
    large = weight.abs() > 0.6745  # the median
    for part in (mask[: n // 2], mask[n // 2 :], mask[large], mask[~large]):
        error = math.sqrt(share * sparsity / part.numel())
        assert abs(part.mean().item() - share) < 5 * error  # 6e-7 of all keys miss this


def test_random_masks_of_two_tensors_are_independent() -> None:
    """Where one tensor's mask is set, the other's is set as often as elsewhere."""
    n = 1 << 18
    weight = torch.ones(n)
    a, b = (mask_of(weight, "random", 0.25, name).double() - 0.25 for name in ("a", "b"))
    assert abs((a * b).mean().item()) < 5 * 0.25 * 0.75 / math.sqrt(n)


def test_ties_at_the_threshold_are_all_perturbed() -> None:
    """h is a value of the tensor, so equal magnitudes go the same way and more than asked move."""
    weight = torch.tensor([0.1, -0.2, 0.2, 0.2, 0.3, -0.4])
    h = threshold(weight, "small", 0.5)
    assert h == float(torch.tensor(0.2))
    assert mask_of(weight, "small", h).tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_sparsity_0_perturbs_everything_for_ever(rule: str, dtype: torch.dtype) -> None:
    """h is infinite for the small rule, and weights that later grow or vanish stay in."""
    weight = distinct(1000, dtype)
    h = threshold(weight, rule, 0.0)
    assert rule != "small" or h == math.inf
    for later in (weight, weight * 0, weight * -0.0, weight.sign() * torch.finfo(dtype).max):
        assert mask_of(later, rule, h).all()


@pytest.mark.parametrize("policy", ["dense", "frozen"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "weight",
    [torch.ones(64), torch.zeros(64), torch.tensor([0.5, -0.5] * 32), torch.tensor([3.0])],
    ids=["gains", "zeros", "signs", "single"],
)
def test_constant_tensors_follow_the_policy(weight: Tensor, rule: str, policy: str) -> None:
    """A tensor of equal magnitudes is perturbed whole or not at all, now and after it moved."""
    h = threshold(weight, rule, 0.75, policy)
    for later in (weight, weight + 0.01, weight * 3, weight - weight):
        assert mask_of(later, rule, h).tolist() == [policy == "dense"] * weight.numel()


@pytest.mark.parametrize("policy", ["dense", "frozen"])
def test_a_tensor_of_mostly_zeros_is_as_constant(policy: str) -> None:
    """Where only zeros would be small, all of them would leave the mask after one update."""
    weight = torch.cat([torch.zeros(60), distinct(40, torch.float32)])
    h = threshold(weight, "small", 0.5, policy)
    for later in (weight, weight + 0.01):
        assert mask_of(later, "small", h).tolist() == [policy == "dense"] * 100
    # With fewer zeros than are asked for, h is a magnitude as of any other tensor.
    h = threshold(weight, "small", 0.25, policy)
    assert mask_of(weight, "small", h).sum().item() == 75


@pytest.mark.parametrize("rule", RULES)
def test_a_tensor_without_entries_has_the_mask_of_no_sparsity(rule: str) -> None:
    """As torch lets a layer have no outputs; the others are masked as ever."""
    empty = torch.empty(0, 4)
    assert threshold(empty, rule, 0.75) == threshold(torch.ones(1), rule, 0.0)
    model = Flat(distinct(100, torch.float32))
    model.none = nn.Parameter(empty)
    opt = sparse(model, mask=rule)
    before = model.w.detach().clone()
    opt.step(model)
    assert 20 < (model.w.detach() != before).sum().item() < 80


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 500, 999])
@pytest.mark.parametrize("rule", RULES)
def test_a_weight_that_is_not_finite_is_refused(rule: str, place: int, bad: float) -> None:
    """A quantile of NaN or infinity would be no threshold."""
    weight = torch.randn(1000, generator=generator())
    weight[place] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        threshold(weight, rule, 0.5)


# ------------------------------------------------------------------------------ masks over time


class Flat(nn.Module):
    """One vector of weights; the loss is their sum with some slopes."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(weight.clone())

    def forward(self) -> Tensor:
        return (self.w.float() * torch.arange(1.0, self.w.numel() + 1)).sum()


def sparse(model: nn.Module, **options: object) -> SparseMeZO:
    settings = {"lr": 1e-3, "eps": 1e-3, "sparsity": 0.5, "backend": "eager"} | options
    return SparseMeZO(model, **settings)  # type: ignore[arg-type]  # a dict of settings


def test_the_mask_is_a_ratchet() -> None:
    """A weight that grew past h stays frozen while the paper's rule holds, and the share falls."""
    weight = distinct(100, torch.float32).abs().sort().values
    weight = weight / weight.max()
    model = Flat(weight)
    opt = sparse(model)
    assert opt.active_share() == 0.5
    with torch.no_grad():
        model.w[:10] += 2.0  # ten of the trained ones outgrow every other
    assert opt.active_share() == 0.4
    grown = model.w.detach().clone()
    for _ in range(5):
        opt.step(model)
    moved = model.w.detach() != grown
    assert not moved[:10].any()
    assert moved[10:50].all()
    assert not moved[50:].any()


def test_a_refreshed_mask_takes_weights_back() -> None:
    """Weights that all outgrew h are frozen until the thresholds are taken anew."""
    weight = 0.5 + torch.arange(100.0) / 100
    model = Flat(weight)
    opt = sparse(model, mask_refresh_every=3)
    with torch.no_grad():
        model.w.mul_(10.0)
    for step in range(4):
        before = model.w.detach().clone()
        opt.step(model)
        moved = model.w.detach() != before
        assert moved.tolist() == [step == 3] * 50 + [False] * 50


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_zero_keeps_its_sign_where_it_is_masked_out(dtype: torch.dtype) -> None:
    """An update leaves the bits of frozen weights: -0.0 does not become +0.0."""
    weight = torch.tensor([-0.0, 0.5, -0.0, -1.0, 0.0, 2.0, -0.0], dtype=dtype)
    model = Flat(weight)
    opt = sparse(model, mask="large", lr=1.0, eps=0.1)
    opt.step(model)
    assert torch.equal(model.w[[0, 2, 4, 6]].view(-1).signbit(), weight[[0, 2, 4, 6]].signbit())
    assert torch.equal(model.w.detach() != weight, weight.abs() >= 0.5)

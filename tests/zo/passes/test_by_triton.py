"""Triton's passes without a GPU: interpreted they have eager bits, compiled each operation rounds.

Two copies of the kernels are loaded. One is run by Triton's interpreter on tensors of the CPU: do
the sources compute what they should? The other is compiled to machine code of GPUs, which is
searched for what would round otherwise; NVIDIA's assembly is also run, instruction by instruction.
Nothing here has run on a GPU: where there is one, the marked tests of
:mod:`tests.zo.passes.test_fused` do.
"""

import copy
import importlib.util
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.mezo_adam import MeZOAdam
from smezo_cli.methods.sparse_mezo import SparseMeZO
from smezo_cli.zo import noise
from smezo_cli.zo.directions import dense
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.passes import by_triton, choose
from smezo_cli.zo.passes.by_triton import TritonPasses
from smezo_cli.zo.passes.draw import Rule
from smezo_cli.zo.passes.eager import EagerPasses
from smezo_cli.zo.selections.masks import RULES
from tests.zo.passes.ptx import Machine
from tests.zo.passes.test_fused import COMPILED, Case, both_equal_two
from tests.zo.passes.test_passes import (
    BF16,
    DTYPES,
    F16,
    directions_of,
    draw_of,
    moved_by,
    same,
    weight_of,
)

triton = pytest.importorskip("triton", reason="Triton is not installed: it has kernels for GPUs")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget

pytestmark = pytest.mark.usefixtures("one_thread")

# One program and several, a pair short of a program and beyond it, odd and even.
SIZES = [1, 2, 3, 127, 128, 2047, 2048, 2049, 4099]
ROUNDINGS = ("nearest", "stochastic")


def name_of(case: object) -> str:
    return str(case).removeprefix("torch.")


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """Load the kernels as Triton's interpreter runs them."""
    path = Path(by_triton.__file__).with_name("triton_kernels.py")
    spec = importlib.util.spec_from_file_location("interpreted_triton_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(kernels)
    assert kernels.IS_INTERPRETED
    function = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    with pytest.MonkeyPatch.context() as patch:
        # A kernel's start lets Triton's names mean those of the interpreter; without this each
        # function that it calls does so once more, which takes nine tenths of the time.
        patch.setattr(function, "__call__", lambda self, *given: self.rewrite()(*given))
        yield kernels


class Interpreted(TritonPasses):
    """The passes by interpreted kernels, on tensors of the CPU."""

    def __init__(self, rule: Rule, kernels: ModuleType) -> None:
        super().__init__(rule)
        self._kernels = kernels
        self.launches = 0

    def _launch(self, *given: Any, **fixed: Any) -> None:
        self.launches += 1
        with np.errstate(all="ignore"):  # NumPy warns of infinities
            super()._launch(*given, **fixed)


def is_as_eager(kernels: ModuleType, case: Case, sizes: list[int]) -> bool:
    """Whether whole passes, in place and into another tensor, and picked ones have eager bits."""
    mask, kind, dtype, rounding, queries, decay = case
    rule = Rule(mask, kind, rounding == "stochastic")
    passes, draw = Interpreted(rule, kernels), draw_of(rule, queries, decay=decay)
    found = []
    for numel in sizes:
        weight = weight_of(numel, dtype)
        wanted = moved_by(EagerPasses(rule), weight, draw)
        found.append(same(moved_by(passes, weight, draw), wanted))
        index = torch.randint(numel, (19, 3), generator=torch.Generator().manual_seed(numel))
        found.append(same(passes.move_at(weight[index], index, numel, draw), wanted[index]))
        passes.move(weight, weight, draw)
        found.append(same(weight, wanted))
    assert passes.launches == 3 * len(sizes)
    return all(found)


# --- what the sources compute -------------------------------------------------------------------


@pytest.mark.parametrize("case", COMPILED, ids=lambda c: "-".join(map(name_of, c)))
def test_interpreted_passes_have_the_bits_of_eager_ones_in_all_sizes(
    case: Case, interpreted: ModuleType
) -> None:
    assert is_as_eager(interpreted, case, SIZES)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("decay", [False, True], ids=["", "decay"])
@pytest.mark.parametrize("mask", RULES)
def test_interpreted_passes_have_the_bits_of_eager_ones_in_every_combination(
    mask: str, decay: bool, queries: int, interpreted: ModuleType
) -> None:
    for kind, dtype, rounding in itertools.product(noise.KINDS, DTYPES, ROUNDINGS):
        assert is_as_eager(interpreted, (mask, kind, dtype, rounding, queries, decay), [129])


@pytest.mark.parametrize("case", COMPILED, ids=lambda c: "-".join(map(name_of, c)))
def test_interpreted_both_probes_have_the_bits_of_two_passes(
    case: Case, interpreted: ModuleType
) -> None:
    both_equal_two(Interpreted(Rule(*case[:2]), interpreted), case, [1, 2, 129, 2049])


def test_a_probe_back_of_no_length_keeps_the_sign_of_zeros(interpreted: ModuleType) -> None:
    """-0.0 - 0.0 is -0.0 and -0.0 + 0.0 is 0.0: a negated zero has to be one."""
    rule = Rule("small")
    weight, draw = torch.full((130,), -0.0), draw_of(rule, scale=0.0)
    found, wanted = torch.empty(2, 130), torch.empty(2, 130)
    Interpreted(rule, interpreted).move_both(weight, *found, draw)
    EagerPasses(rule).move_both(weight, *wanted, draw)
    assert same(found, wanted)
    assert not found.signbit().all()  # some became 0.0


def test_a_sine_is_never_zero() -> None:
    """Triton takes -x for 0 - x, which noise.py asks for where x is a sine: the same but for 0."""
    b = torch.cat([torch.arange(1 << 22), torch.arange((1 << 31) - (1 << 22), (1 << 31) + 1)])
    v = 0.5 - b.float() * 2.0**-31  # pi v is near -pi / 2 or pi / 2, where the cosine is zero
    assert noise._horner(v * v, noise._COS).abs().min() > 0


@pytest.mark.parametrize("there", DTYPES, ids=name_of)
def test_an_interpreted_output_may_have_another_dtype(
    there: torch.dtype, interpreted: ModuleType
) -> None:
    for rounding, here in itertools.product(ROUNDINGS, DTYPES):
        rule = Rule("large", stochastic=rounding == "stochastic")
        weight, draw = weight_of(131, here), draw_of(rule, decay=True)
        found, wanted = torch.empty(2, 131, dtype=there)
        Interpreted(rule, interpreted).move(weight, found, draw)
        EagerPasses(rule).move(weight, wanted, draw)
        assert same(found, wanted)


def test_numbers_that_are_not_stay_so_in_interpreted_bfloat16(interpreted: ModuleType) -> None:
    """A NaN or an infinity of a weight or of a move is not rounded into a number."""
    rule = Rule("large")  # perturbs what is not small, infinities with it
    weight = torch.tensor([math.nan, math.inf, -math.inf, 3.38e38] * 16).to(BF16)
    for scale in (0.05, math.inf, 1e37):
        draw = draw_of(rule, scale=scale)
        wanted = moved_by(EagerPasses(rule), weight, draw)
        found = moved_by(Interpreted(rule, interpreted), weight, draw)
        assert torch.equal(wanted.isnan(), found.isnan())
        assert same(wanted.nan_to_num(0.5), found.nan_to_num(0.5))


def test_interpreted_picked_entries_may_lie_beyond_32_bits(interpreted: ModuleType) -> None:
    rule, numel = Rule("random", stochastic=True), (1 << 34) + 1
    draw, weight = draw_of(rule, 2, decay=True), weight_of(70, BF16)
    index = torch.randint(numel, (70,), generator=torch.Generator().manual_seed(0))
    index[-1] = numel - 1
    found = Interpreted(rule, interpreted).move_at(weight, index, numel, draw)
    assert same(found, EagerPasses(rule).move_at(weight, index, numel, draw))


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("kind", noise.KINDS)
def test_interpreted_directions_are_those_of_eager_passes(
    kind: str, stochastic: bool, interpreted: ModuleType
) -> None:
    """Part by part, the sums and what rounds them."""
    rule = Rule("small", kind, stochastic)
    draw = draw_of(rule, 3)
    for numel in (1, 2, 129, 4099):
        found, wanted = (
            directions_of(passes, torch.empty(numel), draw)
            for passes in (Interpreted(rule, interpreted), EagerPasses(rule))
        )
        assert same(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
        assert (found[1] >= 0).all() == stochastic


@pytest.mark.parametrize("executor", ["sequential", "lockstep"])
@pytest.mark.parametrize("method", [SparseMeZO, MeZOAdam])
def test_steps_by_interpreted_kernels_leave_the_weights_of_eager_ones(
    method: Callable[..., ZeroOrder],
    executor: str,
    interpreted: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Probes, updates and updates that are more than a sum, with stochastic rounding."""
    start = nn.Sequential(nn.Linear(17, 33), nn.Tanh(), nn.Linear(33, 3)).to(BF16)
    x = torch.randn(8, 17).to(BF16)
    options = {"lr": 0.05, "eps": 0.01, "num_queries": 2, "rounding": "stochastic"}
    found, names = [], []
    for make in (EagerPasses, lambda rule: Interpreted(rule, interpreted)):
        monkeypatch.setattr(dense, "choose_passes", lambda rule, *_, make=make: (make(rule), ""))
        model = copy.deepcopy(start)
        optimizer = method(model, executor=executor, weight_decay=0.1, **options)
        for _ in range(2):
            optimizer.step(lambda model=model: model(x).float().square().mean())
        names.append(optimizer.passes.name)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert names == ["eager", "triton"]
    assert same(*found)
    assert not same(found[0], torch.cat([p.detach().flatten() for p in start.parameters()]))


def test_tensors_that_a_kernel_does_not_read_take_eager_passes() -> None:
    """A CPU's, where the kernels are compiled: of a model that is partly offloaded."""
    rule = Rule("small")
    weight, draw = weight_of(1001, F16), draw_of(rule)
    passes, eager = TritonPasses(rule), EagerPasses(rule)
    wanted = moved_by(eager, weight, draw)
    assert same(moved_by(passes, weight, draw), wanted)
    index = torch.arange(0, 1001, 7)
    assert same(passes.move_at(weight[index], index, 1001, draw), wanted[index])
    both_equal_two(passes, COMPILED[0], [129])
    assert same(*(directions_of(worker, weight, draw)[0] for worker in (passes, eager)))


# --- what they are compiled to ------------------------------------------------------------------

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}


class Compiled(TritonPasses):
    """Compiles the kernels that passes would launch, and launches none."""

    def __init__(self, rule: Rule, **options: bool) -> None:
        super().__init__(rule)
        self._options = options or self._kernels.OPTIONS
        self.made: list[Any] = []

    def _is_ready(self, *tensors: Tensor) -> bool:
        return True

    def _launch(self, kernel: Any, where: Tensor, count: int, *given: Any, **fixed: Any) -> None:
        options = fixed | {"size": self.block, "grid": (1,)} | self._options
        self.made.append(kernel.warmup(*given, **options))


def compile_for(case: Case, *, every: bool, **options: bool) -> list[Any]:
    """Compile the kernels for a case, or that of whole passes alone."""
    mask, kind, dtype, rounding, queries, decay = case
    rule = Rule(mask, kind, rounding == "stochastic")
    passes, draw = Compiled(rule, **options), draw_of(rule, queries, decay=decay)
    weight = weight_of(4096, dtype)
    passes.move(weight, weight, draw)
    if every:
        passes.move(weight[:-1], weight[:-1], draw)
        passes.move_both(weight, weight, weight, draw)
        passes.move_at(weight, torch.arange(4096), 4096, draw)
        passes.along(weight, draw, lambda *parts: None)
    return passes.made


@pytest.fixture(scope="module", params=TARGETS)
def target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Have Triton compile for a device that is not there, without its cache of former kernels."""
    device = GPUTarget(*TARGETS[request.param])
    # Triton keeps kernels by the device's number: one that no real device has.
    number = 1000 + list(TARGETS).index(request.param)
    driver = SimpleNamespace(
        get_current_target=lambda: device,
        get_current_device=lambda: number,
        get_current_stream=lambda device: 0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", driver)
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield str(request.param)


@pytest.fixture(scope="module")
def kernels(target: str) -> dict[int, list[Any]]:
    """Compile whole passes for all cases, and every kernel for some: by the case's number."""
    return {n: compile_for(case, every=n in (2, 8)) for n, case in enumerate(COMPILED)}


class Emulated(Compiled):
    """Compiles the kernels for an NVIDIA GPU, and runs their assembly on the CPU."""

    def _launch(self, kernel: Any, where: Tensor, count: int, *given: Any, **fixed: Any) -> None:
        super()._launch(kernel, where, count, *given, **fixed)
        signature = self.made[-1].src.signature
        names = zip(kernel.arg_names, given, strict=False)
        read = [value for name, value in names if signature[name] != "constexpr"]
        scratch = [0, 0]  # Triton's own, which is not used
        Machine(self.made[-1].asm["ptx"], read + scratch, -(-count // self.block)).run()


@pytest.mark.parametrize(
    ("target", "number"),
    [("sm_80", 2), ("sm_80", 8), *(("sm_90", n) for n in range(len(COMPILED)))],
    indirect=["target"],
)
def test_ptx_gives_the_bits_of_eager_passes(target: str, number: int) -> None:
    """Instruction by instruction, in as many threads as a GPU has."""
    case = COMPILED[number]
    mask, kind, dtype, rounding, queries, decay = case
    rule = Rule(mask, kind, rounding == "stochastic")
    passes, eager, draw = Emulated(rule), EagerPasses(rule), draw_of(rule, queries, decay=decay)
    of_all = number in (2, 8)
    for numel in (4096, 1003) if of_all else (1003,):  # whole programs; a part of one, and odd
        weight = weight_of(numel, dtype)
        wanted = moved_by(eager, weight, draw)
        assert same(moved_by(passes, weight, draw), wanted)
    if of_all:
        index = torch.randint(numel, (19, 3), generator=torch.Generator().manual_seed(0))
        assert same(passes.move_at(weight[index], index, numel, draw), wanted[index])
        found, both = torch.empty(2, numel, dtype=dtype), torch.empty(2, numel, dtype=dtype)
        passes.move_both(weight, *found, draw)
        eager.move_both(weight, *both, draw)
        assert same(found, both)
        along = [directions_of(worker, weight, draw) for worker in (passes, eager)]
        assert same(along[0][0], along[1][0])
        assert torch.equal(along[0][1], along[1][1])
        folded = [torch.empty(numel) for _ in (passes, eager)]
        for worker, out in zip((passes, eager), folded, strict=True):
            worker.along(
                weight,
                draw,
                lambda part, x, bits, out=out: out.__setitem__(part, x),
                lambda draws: torch.stack(list(draws)).prod(0),
            )
        assert same(*folded)


def contracted(kernel: Any) -> list[str]:
    """Instructions that multiply and add floating-point numbers with one rounding."""
    if "ptx" in kernel.asm:
        return re.findall(r"\b(?:fma|mad)\.[\w.]*f(?:16|32|64)[\w.]*", kernel.asm["ptx"])
    found = r"\bv_(?:pk_)?(?:fma|fmac|mac|mad)(?:ak|mk)?_(?:f|legacy|mix)\w+"
    return re.findall(found, kernel.asm["amdgcn"])


def test_compiled_kernels_round_each_operation(kernels: dict[int, list[Any]]) -> None:
    """No multiplication is contracted with an addition, and none is left to the assembler."""
    for kernel in itertools.chain(*kernels.values()):
        assert contracted(kernel) == []
        if "ptx" in kernel.asm:  # those that name no rounding are the assembler's to contract
            assert re.findall(r"\b(?:add|sub|mul)\.(?:ftz\.)?f32", kernel.asm["ptx"]) == []


def test_assembled_kernels_round_each_operation(kernels: dict[int, list[Any]]) -> None:
    """NVIDIA's assembler contracts nothing either."""
    for kernel in kernels[2]:  # one of each: to take them apart again is slow
        if "cubin" in kernel.asm:
            lines = kernel.asm["sass"].splitlines()
            assert sum("FMUL" in line for line in lines) > 10
            # One of -0 times 0 is how it writes a constant to a register.
            contracted = [x for x in lines if re.search(r"[FDH]FMA", x) and "-RZ, RZ, " not in x]
            assert contracted == []


def test_contraction_would_be_seen(target: str) -> None:
    """By Triton's default the same kernels have contracted operations."""
    for kernel in compile_for(COMPILED[0], every=True, enable_fp_fusion=True):
        assert len(contracted(kernel)) > 10


def test_compiled_kernels_keep_subnormal_numbers(kernels: dict[int, list[Any]]) -> None:
    """But for what floor reads: rounding.py hands it no subnormal number but zero."""
    for kernel in itertools.chain(*kernels.values()):
        if "ptx" in kernel.asm:
            assert {*re.findall(r"\S*\.ftz\S*", kernel.asm["ptx"])} <= {"cvt.rmi.ftz.f32.f32"}
        else:
            modes = re.findall(r"amdhsa_float_denorm_mode_\w+ (\d)", kernel.asm["amdgcn"])
            assert modes == ["3", "3"]  # kept, where they are read and where they are written


# --- which passes -------------------------------------------------------------------------------


def test_a_cuda_device_gets_these_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And eager ones where Triton is missing, interprets or does not work."""
    cuda, worked = torch.device("cuda"), []

    def try_out(passes: choose.Passes, *rest: object) -> None:
        worked.append(passes.name)
        if passes.name in broken:
            raise OSError("no tools here")

    monkeypatch.setattr(choose, "_try_out", try_out)
    broken: tuple[str, ...] = ()
    assert choose.choose_passes(Rule(), "auto", cuda)[0].name == "triton"
    assert worked == ["triton"] * 3  # in three dtypes
    broken = ("triton",)
    passes, why = choose.choose_passes(Rule(), "auto", cuda)
    assert passes.name == "eager"
    assert why.startswith("Triton does not work here: no tools here")
    broken = ()
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        passes, why = choose.choose_passes(Rule(), "auto", cuda)
        assert passes.name == "eager"
        assert why == "the compiler is off as long as TRITON_INTERPRET=1 is set"
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "smezo_cli.zo.passes.triton_kernels")
    monkeypatch.delattr(sys.modules["smezo_cli.zo.passes"], "triton_kernels")
    passes, why = choose.choose_passes(Rule(), "auto", cuda)
    assert passes.name == "eager"
    assert why.startswith("Triton does not work here: import of triton halted")

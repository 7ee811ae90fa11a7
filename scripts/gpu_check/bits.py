"""Compare bits of the device with those of eager passes on the CPU."""

import dataclasses
import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gpu_check.rows import Place, Row, row, skipped
from smezo_cli.methods.mezo import MeZO
from smezo_cli.methods.sparse_mezo import SparseMeZO
from smezo_cli.zo import noise
from smezo_cli.zo.passes.by_triton import TritonPasses
from smezo_cli.zo.passes.choose import Passes, choose_passes
from smezo_cli.zo.passes.draw import Draw, Rule
from smezo_cli.zo.passes.eager import EagerPasses
from smezo_cli.zo.selections.masks import RULES
from tests.zo.passes.scales import weight_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: of one program less than full, and of many; kernels are compiled for each kind of number
SIZES = (4099, 1 << 18)
PICKED = 97


@dataclasses.dataclass(frozen=True)
class Case:
    """One rule, the dtype of its weights and their number."""

    rule: Rule
    dtype: torch.dtype
    numel: int

    def __str__(self) -> str:
        rounding = "stochastic" if self.rule.stochastic else "nearest"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.rule.mask} {self.rule.noise} {rounding} {dtype} of {self.numel}"


Compute = Callable[[Passes, Case, torch.device], tuple[Tensor, ...]]


def check(place: Place) -> Iterator[Row]:
    """Yield which passes a run takes, a row for each kind of fused and eager ones, and replays.

    Where the time ends before the cases, a row says how many it has compared.
    """
    sizes = SIZES[:1] if place.tiny else SIZES
    cases = [
        Case(Rule(mask, kind, stochastic), dtype, numel)
        for numel, stochastic, dtype, kind, mask in itertools.product(
            sizes, (False, True), DTYPES, noise.KINDS, RULES
        )
    ]
    fused = cases[:1] if place.tiny else cases  # on a CPU a rule takes Numba seconds to compile
    time = place.left
    yield _choices([case.rule for case in fused], place, 0.85 * time)
    # Of the check's time, so much is over when the fused passes of a kind end. Each of them is
    # compiled; the eager ones, which follow, take little.
    shares = {"update": 0.4, "both probes": 0.55, "picked entries": 0.7, "directions": 0.83}
    for name, share in shares.items():
        for which, some, passes_of, end in (
            ("fused passes", fused, _fused, share),
            ("eager passes", cases, _eager, share + 0.03),
        ):
            what, until = f"bits: {name}, {which}", (1 - end) * time
            yield _compared(what, COMPUTED[name], some, passes_of, place, until)
    yield _replayed(place)


def _choices(rules: list[Rule], place: Place, until: float) -> Row:
    """Say whether runs with these rules take the best fused passes that this machine can have."""
    wanted = "triton" if place.device.type == "cuda" else "numba"
    name, done = "bits: passes chosen for a run", 0
    for rule in dict.fromkeys(rules):
        if done and place.left < until:
            break
        passes, why_eager = choose_passes(rule, "auto", place.device)
        done += 1
        if passes.name != wanted:
            why = why_eager or f"those of {wanted} are refused or missing"
            return row(name, False, f"not fused by {wanted}: {why}", by=passes.name)
    return row(name, True, by=wanted, rules=f"{done}/{len(set(rules))}")


def _has_triton(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def _fused(rule: Rule, device: torch.device) -> Passes:
    """Return Triton's passes on a CUDA device, also where a run would refuse them; else chosen."""
    if _has_triton(device):
        return TritonPasses(rule)
    return choose_passes(rule, "auto", device)[0]


def _eager(rule: Rule, device: torch.device) -> Passes:
    return EagerPasses(rule)


def _compared(
    name: str,
    compute: Compute,
    cases: list[Case],
    passes_of: Callable[[Rule, torch.device], Passes],
    place: Place,
    until: float,
) -> Row:
    """Compare cases with the reference until the check has no more than `until` seconds left."""
    passes_of = functools.cache(passes_of)
    entries = differ = done = 0
    names, wrong = set(), []
    for case in cases:
        if done and place.left < until:
            break
        passes = passes_of(case.rule, place.device)
        names.add(passes.name)
        found = compute(passes, case, place.device)
        for a, b in zip(found, _reference(compute, case), strict=True):
            entries += b.numel()
            if num := _num_different(a.cpu(), b):
                differ += num
                wrong.append(str(case))
        done += 1
    note = f"wrong first: {wrong[0]}" if wrong else ""
    if done < len(cases):
        note = "; ".join(filter(None, (note, "the time was over")))
    numbers = {"by": "+".join(sorted(names)), "cases": f"{done}/{len(cases)}"}
    return row(name, not differ, note, **numbers, entries=entries, differ=differ)


@functools.cache
def _reference(compute: Compute, case: Case) -> tuple[Tensor, ...]:
    return compute(EagerPasses(case.rule), case, torch.device("cpu"))


def _num_different(a: Tensor, b: Tensor) -> int:
    """Return how many entries have another pattern, so that -0.0 is not 0.0."""
    assert a.dtype == b.dtype
    patterns = {1: torch.int8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return int((a.view(patterns) != b.view(patterns)).count_nonzero())


_weights = functools.cache(weight_of)


def _draw(case: Case, device: torch.device, queries: int, decay: float | None) -> Draw:
    """Return the numbers of a pass that leaves about half of ordinary weights as they are."""
    keys = [noise.stream_key(0, "z", 5, query, "w") for query in range(queries)]
    a = torch.tensor([0.05 * (-0.7) ** query for query in range(queries)])
    draw = Draw(
        torch.tensor(keys),
        torch.tensor(noise.stream_key(0, "mask", 5, "w")),
        torch.tensor(noise.stream_key(0, "round", 5, "w")),
        torch.tensor(0.5 if case.rule.mask == "random" else 0.67),
        a,
        None if decay is None else torch.tensor(decay),
    )
    return Draw(*(None if x is None else x.to(device) for x in draw))  # type: ignore[arg-type]  # spread


def _update(passes: Passes, case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """An update with two queries and decay."""
    weight = _weights(case.numel, case.dtype).to(device)
    out = torch.full_like(weight, math.nan)
    passes.move(weight, out, _draw(case, device, 2, 0.01))
    return (out,)


def _both(passes: Passes, case: Case, device: torch.device) -> tuple[Tensor, ...]:
    weight = _weights(case.numel, case.dtype).to(device)
    plus, minus = torch.full_like(weight, math.nan), torch.full_like(weight, math.nan)
    passes.move_both(weight, plus, minus, _draw(case, device, 1, None))
    return plus, minus


def _picked(passes: Passes, case: Case, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(case.numel)
    index = torch.randint(case.numel, (PICKED, 3), generator=generator)
    weight = _weights(case.numel, case.dtype)[index].to(device)
    draw = _draw(case, device, 2, 0.01)
    return (passes.move_at(weight, index.to(device), case.numel, draw),)


def _directions(passes: Passes, case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """The noise itself, and what rounds it by chance."""
    weight = _weights(case.numel, case.dtype).to(device)
    total = torch.full_like(weight, math.nan, dtype=torch.float32)
    chance = torch.full_like(weight, -1, dtype=torch.int32)

    def use(part: slice, of_part: Tensor, bits: Tensor | None) -> None:
        total[part] = of_part
        if bits is not None:
            chance[part] = bits

    passes.along(weight, _draw(case, device, 2, None), use)
    return total, chance


COMPUTED: dict[str, Compute] = {
    "update": _update,
    "both probes": _both,
    "picked entries": _picked,
    "directions": _directions,
}

REPLAYED: dict[str, Any] = {
    "mezo": MeZO,
    "small": functools.partial(SparseMeZO, mask="small", sparsity=0.75, mask_refresh_every=2),
    "large": functools.partial(SparseMeZO, mask="large", sparsity=0.75),
    "random": functools.partial(SparseMeZO, mask="random", sparsity=0.75, noise="rademacher"),
}


def _replayed(place: Place) -> Row:
    """Make the same recorded steps on the CPU and on the device: thresholds, masks and updates."""
    name, differ, done, entries = "bits: recorded steps made again", 0, 0, 0
    every = list(itertools.product(("nearest", "stochastic"), DTYPES, REPLAYED))
    wrong: list[str] = []
    for rounding, dtype, method in every:
        if done and place.left < 0:
            break
        models = []
        for device in (torch.device("cpu"), place.device):
            model = _small_model(dtype).to(device)
            optimizer = REPLAYED[method](
                model, lr=0.5, eps=1e-3, weight_decay=0.01, rounding=rounding, check=False
            )
            for scalar in (0.1, -0.3, 0.2):
                optimizer.replay(0.5, [scalar])
            models.append(model)
        here, there = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models)
        entries += here.numel()
        if num := _num_different(there.cpu(), here):
            differ += num
            wrong.append(f"{method} {rounding} {dtype}")
        done += 1
    if not done:
        return skipped(name, "the time was over")
    note = f"wrong first: {wrong[0]}" if wrong else ""
    return row(name, not differ, note, cases=f"{done}/{len(every)}", entries=entries, differ=differ)


def _small_model(dtype: torch.dtype) -> nn.Module:
    """Return a model of some tensors, odd and even; the same weights at each call."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(97, 65), nn.Linear(65, 64))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model.to(dtype)

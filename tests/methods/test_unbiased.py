"""The mean of each method's estimate is the gradient, or the multiple of it that is known.

On a quadratic, over 20,000 directions, by the method's own selection, direction and estimator:
:class:`Together` only measures many points at once, and is compared with the method's own probes.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.cubic_newton import CubicNewton
from smezo_cli.methods.mazo import MaZO
from smezo_cli.methods.senszoq import SensZOQ
from smezo_cli.methods.zoro_fa import ZoroFA
from smezo_cli.zo.loss_meter import LossMeter
from smezo_cli.zo.move import Gradient, Key, Move, Term
from smezo_cli.zo.noise import draw, stream_key
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.targets import Target
from tests.methods.test_every_method import ZEROTH_ORDER, Losses, made, node_of
from tests.zo.test_optimizer import seeded

pytestmark = pytest.mark.usefixtures("one_thread")

DRAWS = 20_000
SIGMAS = 5  # standard errors allowed: one in 1.7 million entries is farther off by chance

#: Rows whose estimates are no terms along keyed dense noise, and the test that holds their claim.
ELSEWHERE = {
    "lozo": "test_lozo.test_the_estimate_is_on_average_the_rank_times_the_gradient",
    # The same selection, direction and estimator as lozo; only the update differs.
    "lozo_m": "test_lozo.test_the_estimate_is_on_average_the_rank_times_the_gradient",
    "subzero": "test_subzero.test_the_estimate_is_the_gradient_on_average",
    "subzero_lora": "test_subzero.test_the_estimate_is_the_gradient_on_average",
    "zo_muon": "test_zo_muon.test_the_estimate_is_on_average_the_gradient_in_the_subspace",
    # The same selection, direction and estimator as zo_muon; only the update differs.
    "mopi": "test_zo_muon.test_the_estimate_is_on_average_the_gradient_in_the_subspace",
    # Of the three only the update differs.
    "tezo": "test_tezo.test_the_estimate_is_the_gradient_on_average",
    "tezo_m": "test_tezo.test_the_estimate_is_the_gradient_on_average",
    "tezo_adam": "test_tezo.test_the_estimate_is_the_gradient_on_average",
    # The gradient over the standard deviation of losses, a number of each step.
    "eggroll": "test_eggroll.test_the_sum_over_pairs_is_a_multiple_of_the_gradient_on_average",
    "quzo": "test_quzo.test_two_roundings_leave_no_bias_and_one_has_that_of_its_variance",
    "grzo": "test_grzo.test_the_sum_over_the_rows_is_on_average_the_gradient",
    "pezo": "test_pezo.test_over_all_starts_the_estimate_is_nearly_the_gradient",
    "hizoo": "test_hizoo.test_the_mean_of_the_estimate_is_the_gradient_over_the_curvature",
    # The same estimator; its direction divides by another H.
    "hizoo_l": "test_hizoo.test_the_mean_of_the_estimate_is_the_gradient_over_the_curvature",
    "conmezo": "test_conmezo.test_the_mean_of_the_estimate_is_longer_along_the_momentum",
    "zo_adamu": "test_zo_adamu.test_the_mean_of_the_estimate_is_longer_along_the_momentum",
    "mezo_svrg": "test_mezo_svrg."
    "test_the_anchor_estimate_is_unbiased_and_more_directions_are_quieter",
    # The selection and the direction of subzero; the mean of one-sided differences is no other.
    "subzero_plus": "test_subzero.test_the_estimate_is_the_gradient_on_average",
    # Terms along dense noise, but noisier than those here by the kernel.
    "kerzoo": "test_kerzoo.test_the_mean_of_the_estimate_is_the_gradient",
    # The best and the worst of some terms, by losses: known where the loss is linear.
    "mezo_gv": "test_mezo_gv.test_the_mean_of_the_estimate_is_a_known_multiple_of_the_gradient",
}
#: Rows of which no mean can be said, and the test here of what holds instead.
NO_MEAN = {
    # Sparse recovery is biased by what it cuts off; nothing is cut where the gradient is sparse.
    "zoro_fa": "test_a_sparse_gradient_is_recovered_in_every_draw",
    # A Newton step is no gradient; the slopes and curvatures that it is made of are exact.
    "cubic_newton": "test_slopes_and_curvatures_along_the_frame_are_exact",
}
MASKED: dict[str, type[ZeroOrder]] = {"mazo": MaZO, "senszoq": SensZOQ}
#: Rows that are the class of another row, with adapters for what it trains.
ADAPTED = {"mezo_lora": "mezo", "mezo_prefix": "mezo", "sparse_mezo_lora": "sparse_mezo"}
#: Rows that draw anew in each step what is perturbed: more steps of fewer directions each.
REDRAWN = ("lezo", "zo_random_sparsity")
ROWS = [name for name in ZEROTH_ORDER if name not in {*ELSEWHERE, *NO_MEAN, *ADAPTED}]

_SLICES = {"embed.w": slice(0, 3), "layers.0.w": slice(3, 5), "layers.1.w": slice(5, 8)}


class Part(nn.Module):
    """Some of the weights, in float64."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())

    def forward(self) -> Tensor:
        return self.w.double()


class Quadratic(nn.Module):
    """1/2 x.A x - b.x over three tensors, two of them layers."""

    def __init__(self) -> None:
        super().__init__()
        w = torch.randn(8, generator=seeded(1))
        self.embed = Part(w[:3])
        self.layers = nn.ModuleList([Part(w[3:5]), Part(w[5:])])
        root = torch.randn(8, 8, generator=seeded(2), dtype=torch.float64) / 4
        self.a, self.b = root @ root.T, torch.randn(8, generator=seeded(3), dtype=torch.float64)

    def at(self, x: Tensor) -> Tensor:
        """The loss at points (n, 8)."""
        return ((x @ self.a) * x).sum(-1) / 2 - x @ self.b

    def weights(self) -> Tensor:
        return torch.cat([part() for part in (self.embed, *self.layers)])

    def gradient(self) -> Tensor:
        return self.a @ self.weights().detach() - self.b

    def forward(self) -> Tensor:
        return self.at(self.weights())


@functools.cache
def _drawn(seed: int, name: str, numel: int, noise: str, keys: tuple[Key, ...]) -> Tensor:
    """z of each key: (keys, numel). Most rows draw by the same keys."""
    names = [stream_key(seed, k.purpose, k.step, k.query, name) for k in keys]
    words = torch.tensor(names).T[..., None]
    return draw(torch.arange(numel), numel, words, noise).double()


class Together(LossMeter):
    """Measures all points of a step at once: u of all keys is drawn in one operation."""

    def __init__(self, opt: ZeroOrder, model: Quadratic) -> None:
        eps, step = opt.param_groups[0]["eps"], opt.num_steps
        super().__init__(model, opt.direction, opt.executors, eps, step, lambda: None)
        self._opt, self._model = opt, model
        masks = list(opt.direction.masks(step))
        self._masks = {t.name: m for t, m in zip(opt.targets, masks, strict=True)}

    def along(self, lines: Sequence[Sequence[Term]]) -> Tensor:
        """The sum of the terms of each line: (lines, 8)."""
        terms = [(row, term) for row, line in enumerate(lines) for term in line]
        keys = sorted({term.key for _, term in terms})
        place = {key: i for i, key in enumerate(keys)}
        out = torch.zeros(len(lines), 8, dtype=torch.float64)
        for target in self._opt.targets:
            own = [
                (row, place[term.key], term.coefficient)
                for row, term in terms
                if term.only is None or target.name in term.only
            ]
            if own:
                rows, places, sizes = zip(*own, strict=True)
                u = (
                    self._drawn(target, keys)[list(places)]
                    * torch.tensor(sizes, dtype=torch.float64)[:, None]
                )
                out[:, _SLICES[target.name]].index_add_(0, torch.tensor(rows), u)
        return out

    def _drawn(self, target: Target, keys: Sequence[Key]) -> Tensor:
        """A target's u of each key under the mask of the step: (keys, entries)."""
        noise = self._opt.direction.noise  # type: ignore[attr-defined]  # it is dense
        u = _drawn(self._opt.seed, target.name, target.parameter.numel(), noise, tuple(keys))
        return u * self._masks[target.name]

    def losses(
        self, groups: Sequence[Sequence[Move]], objective: str = "batch"
    ) -> list[list[float]]:
        moves = [move for group in groups for move in group]
        assert not any(move.decay or move.base for move in moves)
        here = self._model.weights().detach()
        found = iter(self._model.at(here + self.along([m.terms for m in moves])).tolist())
        return [[next(found) for _ in group] for group in groups]

    def derivatives(self, keys: Sequence[Key]) -> list[float]:
        found = self.along([[Term(key, 1.0)] for key in keys]) @ self._model.gradient()
        return list(found.tolist())

    def of(self, gradient: Gradient) -> Tensor:
        """The gradient, written out: (8,)."""
        return self.along([gradient.terms])[0] / gradient.divisor


def fields(name: str, num_queries: int) -> tuple[ZeroOrder, Quadratic]:
    """The method on the quadratic, whose two-sided differences are exact at any eps."""
    model = Quadratic()
    values: dict[str, Any] = {"num_queries": num_queries, "eps": 0.125}
    values |= {"query_scale": 100.0, "last_queries": 100, "schedule_steps": 2, "num_epochs": 2}
    values |= {"sparsity": 0.5, "mask_refresh_every": 0}
    if name in MASKED:
        index = {"embed.w": torch.tensor([0, 2]), "layers.1.w": torch.tensor([1])}
        values = {"num_queries": num_queries, "eps": 0.125, "executor": "sequential"}
        return MASKED[name](model, lr=1e-2, index=index, check=False, **values), model
    return made(name, model, **values), model


def multiple(name: str, model: Quadratic) -> Tensor:
    """What the mean is, over the gradient, entry by entry."""
    out = torch.ones(8, dtype=torch.float64)
    if name in MASKED:
        out[:] = 0
        out[[0, 2, 6]] = 1  # of the mask
    elif name == "sparse_mezo":
        out[:] = 0  # the half of each tensor with the smallest magnitudes; of 3 entries, 1 or 2
        for part in _SLICES.values():
            size = model.weights()[part].abs()
            count = len(size) - round(0.5 * len(size))
            out[part] = (size <= size.sort().values[count - 1]).double()
    elif name == "zo_random_sparsity":
        out[:] = 0.5  # a new mask in every step takes each entry with chance 1 - sparsity
    elif name == "lezo":
        out[3:] = 0.5  # one of two layers rests
    elif name == "elasticzo":
        out[5:] = 0  # the last block has its exact gradient, see test_elasticzo.py
    return out


def estimates(name: str, num_queries: int, steps: int) -> tuple[Tensor, int, Quadratic]:
    """One estimate a step (steps, 8), how many directions they took, and the model."""
    opt, model = fields(name, num_queries)
    found, drawn = [], 0
    for step in range(steps):
        opt.num_steps = step
        opt._begin()
        ask = Together(opt, model)
        gradient = opt.estimator.read(opt.estimator.measure(ask), step)
        found.append(ask.of(gradient))
        drawn += len({term.key for term in gradient.terms})
    return torch.stack(found), drawn, model


@pytest.mark.parametrize("name", ROWS)
def test_the_mean_of_the_estimate_is_the_gradient_or_its_known_multiple(name: str) -> None:
    queries = 20 if name in REDRAWN else 100
    # A step more, as the first of adazeta takes one direction.
    found, drawn, model = estimates(name, queries, DRAWS // queries + 1)
    assert drawn >= DRAWS
    wanted = multiple(name, model) * model.gradient()
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - wanted).abs() <= SIGMAS * error + 1e-12).all()
    # So many draws can tell it from nothing, and from twice the gradient.
    assert error.norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("name", ROWS)
def test_points_measured_together_are_those_of_the_method(name: str) -> None:
    """Three steps by its own probes, and its own move along the gradient.

    Weights of some 1 are stored to 6e-8; slopes of some 10 are seen through eps = 1/8.
    """
    wanted, _, model = estimates(name, 2, 3)
    opt, _ = fields(name, 2)
    own: Any = opt._model
    for step in range(3):
        opt.num_steps = step
        opt._begin()
        gradient = opt.estimator.read(opt.estimator.measure(opt.meter(Losses(own))), step)
        mover, found = opt.direction.mover(step, gradient.move(1.0)), torch.zeros(8)
        for target in opt.targets:
            out = torch.empty_like(target.flat)
            mover.whole(target.parameter, out)
            found[_SLICES[target.name]] = out - target.flat.detach()
        opt.direction.end()
        torch.testing.assert_close(found.double(), wanted[step], atol=2e-5, rtol=2e-5)
    assert model.gradient().norm() > 1


def test_a_claim_stands_somewhere_for_every_row() -> None:
    assert {*ROWS, *ELSEWHERE, *NO_MEAN, *ADAPTED} == set(ZEROTH_ORDER)
    for name, other in ADAPTED.items():
        assert node_of(name)["_target_"] == node_of(other)["_target_"]
    for where in ELSEWHERE.values():
        file, test = where.split(".")
        assert callable(getattr(importlib.import_module(f"tests.methods.{file}"), test))
    assert all(callable(globals()[test]) for test in NO_MEAN.values())


class Plane(nn.Module):
    """g . w over one tensor, g with few entries."""

    def __init__(self, g: Tensor) -> None:
        super().__init__()
        self.w, self.g = nn.Parameter(torch.randn(len(g), generator=seeded(4))), g

    def forward(self) -> Tensor:
        return self.w.double() @ self.g


def test_a_sparse_gradient_is_recovered_in_every_draw() -> None:
    """Of 64 weights 2 have a gradient, and 2 entries are looked for: no mean is needed.

    Weights are stored to 1.2e-7 and slopes seen through eps = 1/8; some 10 of them are solved.
    """
    g = torch.zeros(64, dtype=torch.float64)
    g[[5, 40]] = torch.tensor([1.5, -0.5], dtype=torch.float64)
    model = Plane(g)
    opt: Any = ZoroFA(
        model, lr=1e-2, eps=0.125, num_entries=2, oversampling=3.0, tolerance=0.0, check=False
    )
    (target,) = opt.targets
    for step in range(50):
        opt.num_steps = step
        opt._begin()
        scalars = opt.estimator.measure(opt.meter(model))
        assert scalars[0] == 0  # the first round, 2 entries
        opt.estimator.hold(opt.estimator.read(scalars, step), step)
        torch.testing.assert_close(opt.direction.held(target).double(), g, atol=1e-4, rtol=0)


def test_slopes_and_curvatures_along_the_frame_are_exact() -> None:
    """Of a quadratic: g . u_i and u_i . A u_j to rounding in float64, so no mean is needed."""
    model = Quadratic()
    opt = CubicNewton(model, lr=1.0, eps=0.125, num_queries=4, executor="sequential", check=False)
    for step in range(20):
        opt.num_steps = step
        opt._begin()
        ask = Together(opt, model)
        scalars = torch.tensor(opt.estimator.measure(ask), dtype=torch.float64)
        u = ask.along([[Term(Key(step, i), 8**-0.5)] for i in range(4)])
        curvatures = u @ model.a @ u.T
        rows, columns = torch.triu_indices(4, 4, 1)
        wanted = [u @ model.gradient(), curvatures.diagonal(), curvatures[rows, columns]]
        torch.testing.assert_close(scalars, torch.cat(wanted), atol=1e-11, rtol=1e-11)

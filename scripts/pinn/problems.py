"""Two equations with known solutions: Black-Scholes, and heat in four dimensions.

A network sees all inputs scaled to [-1, 1], the time last.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pinn.derivatives import Jet, Stencil
from smezo_cli.zo.noise import stream_key, uniform_at

#: Computes the loss of one batch of points from the network.
Loss = Callable[[Callable[[Tensor], Tensor]], Tensor]


class Problem(Protocol):
    """An equation, its conditions, and its solution."""

    name: str
    inputs: int
    axes: tuple[str, str]  # what a picture shows along x and y

    def loss(self, stencil: Stencil, seed: int, step: int) -> Loss:
        """Draw the points of a step; return what computes the loss there."""

    def exact(self, points: Tensor) -> Tensor:
        """Return the solution (n,) at points (n, D), in float64 where that matters."""

    def found(self, network: Callable[[Tensor], Tensor], stencil: Stencil, at: Tensor) -> Tensor:
        """Return u (n,) as the network has it, conditions built in, at points (n, D)."""

    def section(self, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return points of a grid to draw (r r, D), and the coordinates (r,) along x and y."""


def uniform(count: int, inputs: int, *key: int | str) -> Tensor:
    """Return points (count, inputs) drawn evenly from [-1, 1] by a key."""
    size = count * inputs
    drawn = uniform_at(torch.arange(size), size, torch.tensor(stream_key(*key)))
    return 2 * drawn.view(count, inputs) - 1


def _grid(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return columns.flatten(), rows.flatten()


class BlackScholes:
    """The price v of a European call, in units of the strike, as a function of stock and time.

        dv/dtau = 1/2 s^2 y^2 d2v/dy2 + r y dv/dy - r v

    for the stock y in [0, 2] and the time tau in [0, 1] that is left. Known are v(y, 0) =
    max(y - 1, 0), v(0, tau) = 0 and v(2, tau), which is all but 2 - exp(-r tau). The network is v;
    the conditions are terms of the loss.
    """

    name = "black-scholes"
    inputs = 2
    axes = ("stock / strike", "time left (years)")
    rate, volatility = 0.05, 0.2
    interior, at_end, at_edges = 40, 16, 4  # points of a step
    weight = 10.0  # of the conditions

    def _physical(self, points: Tensor) -> tuple[Tensor, Tensor]:
        return 1 + points[:, 0], (1 + points[:, 1]) / 2

    def loss(self, stencil: Stencil, seed: int, step: int) -> Loss:
        """See :class:`Problem`."""
        n, k = self.interior, self.at_end
        points = uniform(n + k + 2 * self.at_edges, 2, seed, "points", step)
        points[n : n + k, 1] = -1
        points[n + k : n + k + self.at_edges, 0] = -1
        points[n + k + self.at_edges :, 0] = 1
        y, tau = self._physical(points)
        known = torch.where(tau > 0, y - torch.exp(-self.rate * tau), y - 1).clamp_min(0)[n:]
        around, y = stencil.around(points), y[:n]

        def loss(network: Callable[[Tensor], Tensor]) -> Tensor:
            v = stencil.jet(network(around))
            off = (v.value[n:] - known).square()
            v = v[:n]
            diffusion = 0.5 * (self.volatility * y).square() * v.second[:, 0]
            growth = self.rate * (y * v.first[:, 0] - v.value)
            residual = 2 * v.first[:, 1] - diffusion - growth
            return residual.square().mean() + self.weight * (off[:k].mean() + off[k:].mean())

        return loss

    def exact(self, points: Tensor) -> Tensor:
        """See :class:`Problem`."""
        y, tau = (x.double() for x in self._physical(points))
        spread = self.volatility * tau.clamp_min(1e-12).sqrt()
        d1 = (y.clamp_min(1e-12).log() + (self.rate + self.volatility**2 / 2) * tau) / spread
        phi = torch.special.ndtr
        return y * phi(d1) - torch.exp(-self.rate * tau) * phi(d1 - spread)

    def found(self, network: Callable[[Tensor], Tensor], stencil: Stencil, at: Tensor) -> Tensor:
        """See :class:`Problem`."""
        return stencil.jet(network(stencil.around(at))).value

    def section(self, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Problem`."""
        line = torch.linspace(-1, 1, resolution)
        points = torch.stack(_grid(line, line), dim=1)
        return points, 1 + line, (1 + line) / 2


class Heat:
    """The temperature u in a cube of four dimensions whose surface is kept at 0.

        du/dt = k (d2u/dx1^2 + ... + d2u/dx4^2),  x in [-1, 1]^4, t in [0, 1]

    It starts as the sum of two modes, which decay at different rates. Conditions are built in: with
    the network N,

        u(x, t) = u(x, 0) + t (1 - x1^2) ... (1 - x4^2) N(x, t)
    """

    name = "heat"
    inputs = 5
    axes = ("x1 = x2", "time")
    conductivity = 0.1
    interior = 24  # points of a step
    modes = ((1.0, (1, 1, 1, 1)), (0.5, (2, 1, 1, 1)))  # amplitude, half waves along each x

    def _time(self, points: Tensor) -> Tensor:
        return (1 + points[:, -1]) / 2

    def _wave(self, points: Tensor, half_waves: Sequence[int]) -> Tensor:
        """A product of cosines (one half wave) and sines (two), all 0 where any x is -1 or 1."""
        angles = points[:, :-1] * torch.tensor(half_waves) * (math.pi / 2)
        is_sine = torch.tensor([n == 2 for n in half_waves])
        return torch.where(is_sine, angles.sin(), angles.cos()).prod(1)

    def _rate(self, half_waves: Sequence[int]) -> float:
        return self.conductivity * sum((math.pi / 2 * n) ** 2 for n in half_waves)

    def _start(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """u and k (d2u/dx1^2 + ...) at time 0."""
        waves = [(a * self._wave(points, n), self._rate(n)) for a, n in self.modes]
        whole = torch.stack([w for w, _ in waves]).sum(0)
        return whole, torch.stack([-rate * w for w, rate in waves]).sum(0)

    def _ramp(self, points: Tensor) -> Jet:
        """t (1 - x1^2) ... (1 - x4^2)."""
        one = torch.ones(len(points))

        def along(i: int, value: Tensor, first: Tensor, second: Tensor) -> Jet:
            pick = torch.eye(self.inputs)[i]
            return Jet(value, first[:, None] * pick, second[:, None] * pick)

        ramp = along(self.inputs - 1, self._time(points), 0.5 * one, 0 * one)
        for i in range(self.inputs - 1):
            x = points[:, i]
            ramp = ramp * along(i, 1 - x.square(), -2 * x, -2 * one)
        return ramp

    def loss(self, stencil: Stencil, seed: int, step: int) -> Loss:
        """See :class:`Problem`."""
        points = uniform(self.interior, self.inputs, seed, "points", step)
        around, ramp, (_, spread_at_start) = (
            stencil.around(points),
            self._ramp(points),
            self._start(points),
        )

        def loss(network: Callable[[Tensor], Tensor]) -> Tensor:
            change = ramp * stencil.jet(network(around))
            spread = spread_at_start + self.conductivity * change.second[:, :-1].sum(1)
            return (2 * change.first[:, -1] - spread).square().mean()

        return loss

    def exact(self, points: Tensor) -> Tensor:
        """See :class:`Problem`."""
        t = self._time(points)
        decayed = [a * self._wave(points, n) * torch.exp(-self._rate(n) * t) for a, n in self.modes]
        return torch.stack(decayed).sum(0)

    def found(self, network: Callable[[Tensor], Tensor], stencil: Stencil, at: Tensor) -> Tensor:
        """See :class:`Problem`."""
        jet = stencil.jet(network(stencil.around(at)))
        return self._start(at)[0] + self._ramp(at).value * jet.value

    def section(self, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Problem`. The other x are 0."""
        line = torch.linspace(-1, 1, resolution)
        points = torch.zeros(resolution**2, self.inputs)
        points[:, 0], points[:, -1] = _grid(line, line)
        points[:, 1] = points[:, 0]
        return points, line, (1 + line) / 2


PROBLEMS: dict[str, Problem] = {problem.name: problem for problem in (BlackScholes(), Heat())}

"""MeZO-Adam: Adam on MeZO's gradient estimate (arXiv 2305.17333; Adam: arXiv 1412.6980)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.passes.by_numba import NumbaPasses
from smezo_cli.zo.passes.eager import EagerPasses, Use
from smezo_cli.zo.rounding import ROUNDINGS
from smezo_cli.zo.targets import Target


class MeZOAdam(ZeroOrder):
    """Adam's moments of the estimate, elementwise, in float32: 8 bytes a weight.

    One step, from the queries q = 1..Q of :class:`smezo_cli.zo.optimizer.ZeroOrder` and with t = 1
    at first:

        g = 1/Q sum_q projected_grad_q z_q
        m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
        theta <- theta - lr [m / (1 - beta1^t)] / [sqrt(v / (1 - beta2^t)) + adam_eps]
                 - lr weight_decay theta

    The queries are one gradient; z is drawn again part by part, so that no tensor of the model's
    size is needed but m and v. These follow from the recorded projected gradients alone, whatever
    the weights are.

    Args:
        model: as for :class:`smezo_cli.zo.optimizer.ZeroOrder`, which has the arguments not named
        here.
        lr: step size: about the largest move of a weight in a step.
        eps: radius of the probe.
        betas: decay of m and of v, each in [0, 1).
        adam_eps: added to the root of v; Adam's own epsilon, not the radius of the probe.
        seed: see there.
        num_queries: see there.
        weight_decay: apart from the moments, as in AdamW.
        clip_projected_grad: see there; cut before the moments.
        freeze: see there.
        noise: see there.
        rounding: see there; of the weights, for m and v are float32.
        executor: see there.
        backend: see there.
        keep_noise: see there.
        check: see there.

    Raises:
        ValueError: an argument out of range.
    """

    keeps_state = True

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        eps: float,
        betas: Sequence[float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        seed: int = 0,
        num_queries: int = 1,
        weight_decay: float = 0.0,
        clip_projected_grad: float | None = None,
        freeze: Iterable[str] = (),
        noise: str = "gaussian",
        rounding: str = "nearest",
        executor: str = "auto",
        backend: str = "auto",
        keep_noise: bool | str = "auto",
        check: bool = True,
    ) -> None:
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={list(betas)}: two numbers in [0, 1)")
        if not (adam_eps > 0 and math.isfinite(adam_eps)):
            raise ValueError(f"adam_eps={adam_eps}: must be above 0")
        super().__init__(
            model,
            lr=lr,
            eps=eps,
            seed=seed,
            num_queries=num_queries,
            weight_decay=weight_decay,
            clip_projected_grad=clip_projected_grad,
            mask="none",
            freeze=freeze,
            noise=noise,
            rounding=rounding,
            executor=executor,
            backend=backend,
            keep_noise=keep_noise,
            check=check,
        )
        self.betas, self.adam_eps = (float(betas[0]), float(betas[1])), adam_eps
        #: m and v of a tensor, flat, by its name; none before the first step
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}

    def identity(self) -> dict[str, Any]:
        """See :meth:`smezo_cli.zo.optimizer.ZeroOrder.identity`."""
        return super().identity() | {"betas": list(self.betas), "adam_eps": self.adam_eps}

    def coefficients(self, projected_grad: Sequence[float], lr: float) -> list[float]:
        """Those of g, which the lr has no part in: projected_grad_q / Q, clipped."""
        return super().coefficients(projected_grad, -1.0)

    def update(self, coefficients: Sequence[float], decay: float = 0.0) -> None:
        """Take g = sum_q a_q z_q into the moments, and move the weights.

        Raises:
            ValueError: weights were restored without the moments that belong to them.
        """
        if self.num_steps and not self._moments:
            raise ValueError(f"the moments of step {self.num_steps} were not restored")
        direction = self.direction(range(len(coefficients)), coefficients)
        for target in self.targets:
            use = self._part_of(target, decay)
            if self.keep_noise:
                z, _ = self.kept(target, direction)
                EagerPasses.along_kept(z, direction.draw(target), use)
            elif isinstance(self.passes, NumbaPasses):
                self.passes.along(target.flat, direction.numbers(target), use)
            else:
                self.passes.along(target.flat, direction.draw(target), use)

    def _part_of(self, target: Target, decay: float) -> Use:
        """The update of a part of a tensor; each operation rounds once, so bits are the same."""
        flat, t = target.flat, self.num_steps + 1
        if target.name not in self._moments:
            zeros = torch.zeros_like(flat, dtype=torch.float32)
            self._moments[target.name] = zeros, torch.zeros_like(zeros)
        first, second = self._moments[target.name]
        (beta1, beta2), adam_eps = self.betas, self.adam_eps
        size = -self.param_groups[0]["lr"] / (1 - beta1**t)
        root = math.sqrt(1 - beta2**t)
        rounded = ROUNDINGS.get(flat.dtype)

        def use(part: slice, g: Tensor, bits: Tensor | None) -> None:
            m = first[part].mul_(beta1).add_(g * (1 - beta1))
            v = second[part].mul_(beta2).add_((g * g).mul_(1 - beta2))
            move = (m / v.sqrt().div_(root).add_(adam_eps)).mul_(size)
            w = flat[part].float()
            if decay:
                move -= decay * w
            value = w + move
            flat[part] = value if bits is None or rounded is None else rounded(value, bits)

        return use

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See :meth:`ZeroOrder.snapshot`; the tensors are m and v themselves."""
        pairs = self._moments.items()
        tensors = {f"{name}/exp_avg": m for name, (m, _) in pairs}
        return super().snapshot()[0], tensors | {f"{name}/exp_avg_sq": v for name, (_, v) in pairs}

    def restore(self, numbers: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`snapshot`; without tensors a next step is possible at step 0 alone.

        Raises:
            LookupError, ValueError: they are not of these weights.
        """
        super().restore(numbers, {})
        self._moments.clear()
        for target in self.targets if tensors else ():
            flat = target.flat
            pair = [tensors[f"{target.name}/{key}"] for key in ("exp_avg", "exp_avg_sq")]
            if any(x.shape != flat.shape or x.dtype != torch.float32 for x in pair):
                raise ValueError(f"{target.name} has other moments")
            m, v = (x.to(flat.device, copy=True) for x in pair)
            self._moments[target.name] = m, v

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`snapshot`, with copies of m and v, for users of torch's own protocol."""
        numbers, tensors = self.snapshot()
        return numbers | {"moments": {name: tensor.clone() for name, tensor in tensors.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.restore(state_dict, state_dict["moments"])

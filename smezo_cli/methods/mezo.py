"""MeZO: dense two-sided zeroth-order SGD (arXiv 2305.17333, Algorithm 1)."""

from collections.abc import Iterable

from torch import nn

from smezo_cli.zo.optimizer import ZeroOrder


class MeZO(ZeroOrder):
    """Every weight perturbed; see :class:`smezo_cli.zo.optimizer.ZeroOrder` for the arguments."""

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        eps: float,
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
        super().__init__(
            model,
            lr=lr,
            eps=eps,
            seed=seed,
            num_queries=num_queries,
            weight_decay=weight_decay,
            clip_projected_grad=clip_projected_grad,
            freeze=freeze,
            noise=noise,
            rounding=rounding,
            executor=executor,
            backend=backend,
            keep_noise=keep_noise,
            check=check,
        )

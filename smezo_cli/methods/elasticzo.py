"""ElasticZO: zeroth-order steps below, backpropagation in the last layers (arXiv 2501.04287)."""

import re
from typing import ClassVar, Unpack

from torch import Tensor, nn

from smezo_cli.zo import dynamo
from smezo_cli.zo.backprop import Backprop
from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.parts import Common, check_common
from smezo_cli.zo.ranges import Blocks, Count, Noise, StepSize
from smezo_cli.zo.selections.layers import frozen, layer_of, layers_of, place_of
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.targets import Target, check, literal, select
from smezo_cli.zo.updates.sgd import SGD

# Parts of names of what stands behind the blocks of models of transformers; not "embed" besides.
_BEHIND = re.compile(r"(^|\.)(\w*norm\w*|ln_f|\w*head\w*|project_out|score|classifier)(\.|$)")


class ElasticZO(ZeroOrder):
    """Train the last layers by backpropagation, and all before them by MeZO's steps.

    One step at the weights (theta, phi), phi those of the last ``tail_blocks`` blocks and of what
    comes behind them (the last norm, the output layer):

        projected_grad_q = [L(theta + eps z_q, phi) - L(theta - eps z_q, phi)] / (2 eps)
        phi <- phi - tail_lr (grad_phi L(theta, phi) + weight_decay phi)
        theta <- theta - lr (1/Q sum_q projected_grad_q z_q + weight_decay theta)

    Both are measured before either is written. Activations are kept for the tail alone, and a
    tensor of the tail moves as soon as its gradient is known, so that no state is kept. Forwards a
    step: 2 a query and one for the tail, with its backward. The paper takes the tail's gradient
    from the two perturbed passes, which saves a forward and mixes the probe's noise into it; here
    it is the exact one at the weights. An output layer that is tied to the embedding is trained by
    the gradient of its own use; both move. Its steps cannot be made again from scalars.

    Args:
        model: any module with numbered layers; parameters with ``requires_grad`` are trained.
        tail_blocks: blocks before the output layer that are trained by backpropagation; 0: only
            what lies behind the last block.
        tail_lr: step size of the tail; it follows the schedule of lr.
        num_queries: Q.
        noise: "gaussian" or "rademacher".
        common: see :class:`smezo_cli.zo.parts.Common`.
    """

    replays: ClassVar = False
    needs_gradient: ClassVar = True

    def __init__(
        self,
        model: nn.Module,
        *,
        tail_blocks: Blocks = 1,
        tail_lr: StepSize = 1e-4,
        num_queries: Count = 1,
        noise: Noise = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        check_common(type(self).__name__, common)
        plain = dynamo.original(model)
        freeze = frozen(model, common)
        targets = select(plain, freeze, [])
        head = _head(plain)
        tail = _tail(targets, tail_blocks, None if head is None else head.weight)
        common["freeze"] = [*freeze, *(literal(target.name) for target in tail)]
        super().__init__(
            model,
            selection=Everything(),
            direction=Dense(noise),
            estimator=TwoSided(num_queries),
            update=SGD(),
            tail=Backprop(
                plain,
                {target.name: target.parameter for target in tail},
                scale=tail_lr / common["lr"],
                seed=common.get("seed", 0),
                rounding=common.get("rounding", "nearest"),
                weight_decay=common.get("weight_decay", 0.0) * tail_lr / common["lr"],
                alone=head,
            ),
            **common,
        )


def _head(model: nn.Module) -> nn.Linear | None:
    """Return the output layer of a language model of transformers; None of other modules."""
    find = getattr(model, "get_output_embeddings", None)
    found = None if find is None else find()
    return found if isinstance(found, nn.Linear) else None


def _tail(targets: list[Target], blocks: int, head: Tensor | None) -> list[Target]:
    """Return the targets of the last blocks, of the output layer and of what is behind the blocks.

    That is what belongs to no layer and is called a norm, a head or the like.

    Raises:
        ValueError: there are no layers, or nothing is left before the tail.
    """
    layers = layers_of(targets)
    rest = layers.pop("", [])
    check(bool(layers), "elasticzo trains the last layers apart, and no layer here has a number")
    order = sorted(layers, key=place_of)
    check(
        blocks < len(order),
        f"tail_blocks={blocks}: the model has {len(order)} layers, and one must stay before them; "
        f"at most {len(order) - 1}",
    )
    last = set(order[len(order) - blocks :]) if blocks else set()
    tail = [
        target
        for target in targets
        if layer_of(target.name) in last
        or (head is not None and target.parameter is head)
        or (target in rest and "embed" not in target.name and _BEHIND.search(target.name))
    ]
    beside = ", ".join(target.name for target in rest) or "none"
    check(
        bool(tail),
        f"tail_blocks={blocks} trains what stands behind the last block, a norm or a head, and of "
        f"the trained tensors that belong to no block ({beside}) none is called so: take 1 or more",
    )
    return tail

"""Find the blocks of a model whose outputs have outliers, by forwards alone."""

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from smezo_cli.zo import dynamo
from smezo_cli.zo.selections.layers import layer_of, place_of
from smezo_cli.zo.step import Closure

#: An entry of more than so many times the median magnitude of a hidden state is an outlier. Our
#: choice, see :func:`dominant`. On four rows of rotten_tomatoes blocks 0 to 10 of SmolLM2-135M come
#: to 42 to 677, block 11 to 11,600.
FACTOR = 1000.0


def blocks_of(model: nn.Module) -> dict[int, nn.Module]:
    """Return the numbered blocks of a model in order: those of its longest stack.

    By the names of its parameters, such as model.layers.3.mlp.up_proj.weight.
    """
    stacks: dict[str, dict[int, str]] = {}
    for name, _ in model.named_parameters():
        if layer := layer_of(dynamo.plain_name(name)):
            stack, number = place_of(layer)
            stacks.setdefault(stack, {})[number] = layer
    longest = max(stacks.values(), key=len, default={})
    return {number: model.get_submodule(layer) for number, layer in sorted(longest.items())}


@torch.no_grad()
def ratios(model: nn.Module, losses: Sequence[Closure]) -> dict[int, float]:
    """Return how far the outputs of each block reach: max |x| over median |x|.

    Args:
        model: any module with numbered blocks, each of which returns a hidden state, or it first.
        losses: closures that run the model; of several runs the largest ratio counts.

    Raises:
        ValueError: the model has no numbered blocks, or one returns something else.
    """
    blocks, found = blocks_of(model), dict[int, float]()
    if not blocks:
        raise ValueError("no parameter of the model belongs to a block with a number")

    def note(number: int, module: nn.Module, inputs: object, output: object) -> None:
        state = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(state, Tensor):
            raise ValueError(f"block {number} returns no hidden state first")
        size = state.detach().float().abs().flatten()
        median = float(size.median())
        ratio = float(size.max()) / median if median else 0.0
        found[number] = max(ratio, found.get(number, 0.0))

    with ExitStack() as hooks:
        for number, block in blocks.items():
            hooks.enter_context(block.register_forward_hook(functools.partial(note, number)))
        for loss in losses:
            loss()
    return dict(sorted(found.items()))


def dominant(ratios: Mapping[int, float], factor: float | None = None) -> int:
    """Return the first block whose output has an outlier (the dominant layer of arXiv 2606.05516).

    The paper was read at second hand, which says that the layer is the first decoder layer whose
    activations have outliers, and not what an outlier is: the factor is our choice.

    Args:
        ratios: of each block, from :func:`ratios`.
        factor: of an outlier; None: :data:`FACTOR`.

    Raises:
        ValueError: no block has one.
    """
    factor = FACTOR if factor is None else factor
    for number, ratio in sorted(ratios.items()):
        if ratio > factor:
            return number
    most = max(ratios, key=lambda number: ratios[number])
    raise ValueError(
        f"no block has an output above {factor:g} times its median (block {most} comes to "
        f"{ratios[most]:.3g}), so none is dominant: give block numbers, such as layers={most}"
    )

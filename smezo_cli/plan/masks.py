"""Give a planned method the mask that its run makes once: so many places, which have no values."""

from collections.abc import Mapping
from fnmatch import filter as matching
from typing import Any

from smezo_cli.config.method_keys import trait
from smezo_cli.plan.dry_run import DryRun

ENTRY = 8  # bytes of a place: an int64


def needs_mask(run: DryRun) -> bool:
    """Return whether the method takes the places of a mask, which a run makes once."""
    return trait(run.settings.method, "needs_mask", default=False)


def places(run: DryRun) -> dict[str, Any]:
    """Return the places of the mask in each trained tensor, on the meta device.

    The mask takes the same share of every tensor; of all weights together a run takes as many.
    """
    import torch

    from smezo_cli.zo.selections.layers import frozen
    from smezo_cli.zo.targets import select

    node = run.settings.method
    found = {}
    for target in select(run.model, frozen(run.model, node), []):
        numel = target.parameter.numel()
        count = max(1, numel - round(node["sparsity"] * numel))
        found[target.name] = torch.empty(count, dtype=torch.int64, device="meta")
    return found


def hold_codes(run: DryRun, index: Mapping[str, Any]) -> None:
    """Hold the weights beside the mask as codes, if that is asked for, as a run does."""
    bits = run.settings.method.get("frozen_bits")
    if bits is None:
        return
    from smezo_cli.models.quantised import freeze_as_codes
    from smezo_cli.zo.quantised import linear_layers

    for model in {id(m): m for m in (run.model, run.computing)}.values():
        names = {f"{name}.weight" for name in linear_layers(model, trained=False)}
        freeze_as_codes(model, {n: at for n, at in index.items() if n in names}, bits=bits)


def node_beside(run: DryRun) -> dict[str, Any]:
    """Return the method's node without globs of weights that are codes now, and so frozen."""
    node = run.settings.method
    if node.get("frozen_bits") is None:
        return dict(node)
    trained = [name for name, p in run.model.named_parameters() if p.requires_grad]
    return {**node, "freeze": [glob for glob in node["freeze"] if matching(trained, glob)]}


def bytes_of_mask(index: Mapping[str, Any]) -> int:
    """Return the bytes of the places in memory."""
    return ENTRY * sum(map(len, index.values()))


def bytes_on_disk(run: DryRun, index: Mapping[str, Any]) -> int:
    """Return the bytes of the places in the run folder: int32 where that is enough."""
    few = all(p.numel() < 1 << 31 for p in run.model.parameters())
    return bytes_of_mask(index) // (2 if few else 1)

"""Say what enters the first trained block follows from, and where it is kept for other runs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from smezo_cli.files.fetch import cache_dir
from smezo_cli.models.blocks import Blocks
from smezo_cli.run.follows_from import machine_and_model
from smezo_cli.run.loaded import Loaded
from smezo_cli.store.input_cache import InputCache, remove_oldest
from smezo_cli.store.saved import tensors_digest
from smezo_cli.store.versions import libraries
from smezo_cli.zo.quantised import QuantisedLinear


def of(loaded: Loaded, blocks: Blocks, first: int, say: Callable[[str], None]) -> InputCache | None:
    """Return where what enters a block is kept for other runs; None where it is not.

    The weights are hashed as they are now, so they must be those that the run began with. With
    weights that are codes and with Python files that the model brings nothing is kept, as no other
    run would have it, or know it; a line says so.
    """
    s = loaded.settings
    if not s.cache_inputs:
        return None
    if s.model["trust_remote_code"] or _holds_codes(blocks, first):
        say("  kept    nothing in the cache: its weights are codes, or the model brings its code")
        return None
    folder = cache_dir() / "inputs"
    if removed := remove_oldest(folder):
        say(f"  removed {removed / 1e6:.0f} MB of {folder} that were used longest ago")
    about = machine_and_model(loaded, libraries()) | {
        "block": first,
        "weights": tensors_digest(_before(blocks, first)),
        "looks_ahead": s.model["family"] == "masked",
    }
    return InputCache(folder, about, say)


def _before(blocks: Blocks, first: int) -> dict[str, Tensor]:
    """Return parameters and buffers of the model's body that are in no block from `first` on."""
    behind = {
        id(tensor)
        for block in blocks.modules[first:]
        for tensor in (*block.parameters(), *block.buffers())
    }
    named: list[tuple[str, Any]] = [*blocks.body.named_parameters(), *blocks.body.named_buffers()]
    return {name: t.detach() for name, t in named if id(t) not in behind | blocks.behind}


def _holds_codes(blocks: Blocks, first: int) -> bool:
    frozen: list[nn.Module] = [m for block in blocks.modules[:first] for m in block.modules()]
    return any(isinstance(module, QuantisedLinear) for module in frozen)

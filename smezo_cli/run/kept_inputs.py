"""Keep what enters the first trained block, where a run asks for it (``keep_inputs``)."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from smezo_cli.errors import UserError
from smezo_cli.files.space import check_space
from smezo_cli.machine.memory import available_bytes
from smezo_cli.methods.base import Method
from smezo_cli.models.blocks import NAMES, Blocks, blocks_of
from smezo_cli.run.begin import Run
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.rows import Rows
from smezo_cli.scoring.candidates import Candidates, is_one
from smezo_cli.scoring.kept_inputs import KeptInputs, KeptRows
from smezo_cli.scoring.parts import of_one_part

BUDGET = 4  # what is kept may take one part in so many of the memory that is free


def check(run: Run, loaded: Loaded, method: Method) -> None:
    """Refuse ``keep_inputs=true`` where that cannot be, before any row is scored.

    Raises:
        UserError: it cannot be.
    """
    if run.settings.keep_inputs is True:
        _first_trained(loaded, method)


def settle(run: Run, loaded: Loaded, method: Method, rows: Rows) -> None:
    """Let the steps and the evaluations of dev begin at the first trained block, if asked to.

    Raises:
        UserError: the disk is too full; or scores would be others.
    """
    if run.settings.keep_inputs is False:
        return
    try:
        kept = begin(loaded, method, run.folder.path)
    except UserError as error:  # of keep_inputs=auto
        run.say(f"  kept    nothing: {error}")
        return
    if run.team is not None:
        run.team.tell("keep_inputs", folder=str(run.folder.path.absolute()))
    _check(loaded, kept, of_one_part(rows.train)[:2])
    size = kept.token_bytes * sum(map(_tokens, (*rows.train, *rows.dev)))
    held = min(size, kept.rows.budget)
    check_space(run.folder.path, size - held, "what keep_inputs keeps", "leave keep_inputs out")
    where = f"{held / 1e6:.1f} MB in memory"
    if size > held:
        where += f", {(size - held) / 1e6:.1f} MB in the run folder"
    run.say(
        f"  kept    what enters block {kept.first} of {kept.num_blocks}, once a row (at most "
        f"{where}): steps begin there"
    )


def begin(loaded: Loaded, method: Method, folder: Path) -> KeptInputs:
    """Let the model's forwards begin at the first block that the method trains.

    Raises:
        UserError: that cannot be.
    """
    blocks, first = _first_trained(loaded, method)
    if not folder.is_dir():  # of another machine
        folder = Path.cwd()
    looks_ahead = loaded.settings.model["family"] == "masked"
    rows = KeptRows(available_bytes() // BUDGET, folder)
    kept = KeptInputs(blocks.body, blocks.modules, first, looks_ahead, rows)
    loaded.scorer.forward.kept = kept
    return kept


def end(loaded: Loaded) -> None:
    """Make the model compute all its blocks again, and give back what was kept."""
    kept, loaded.scorer.forward.kept = loaded.scorer.forward.kept, None
    if kept is not None:
        kept.remove()


def found(loaded: Loaded | None, asked: object) -> Mapping[str, Any]:
    """Return what result.json says of it: nothing where nobody asked."""
    if asked is False:
        return {}
    kept = None if loaded is None else loaded.scorer.forward.kept
    return {
        "kept_inputs": None
        if kept is None
        else {"first_block": kept.first, "num_blocks": kept.num_blocks}
    }


def _first_trained(loaded: Loaded, method: Method) -> tuple[Blocks, int]:
    """Return the model's blocks, and which of them is the first that something is trained in.

    Raises:
        UserError: all blocks must be computed.
    """
    blocks = _blocks(loaded, method)
    if first := blocks.first_trained(method.trained.values()):
        return blocks, first
    before = [name for name, p in method.trained.items() if not blocks.first_trained([p])]
    outside = [name for name in before if not name.startswith(f"{blocks.path}.")]
    others = [name for name in method.trained if name not in outside]
    some = blocks.globs(max(1, len(blocks.modules) * 3 // 4))
    globs = dict.fromkeys(
        (
            *loaded.settings.method.get("freeze", ()),
            *(_around(name, others) for name in outside),
            *some,
        )
    )
    word = f"method.freeze=[{','.join(json.dumps(glob) for glob in globs)}]"
    raise _refused(
        loaded,
        f"{before[0]} is trained, and all blocks lie behind it",
        f"freeze what comes before the last blocks, such as by {shlex.quote(word)}, or ",
    )


def _around(name: str, others: Sequence[str]) -> str:
    """Return a short glob that matches a name of a parameter, and none of the others."""
    parts = name.split(".")
    for depth in range(2, len(parts)):
        above = ".".join(parts[:depth])
        if not any(other.startswith(f"{above}.") for other in others):
            return f"{above}.*"
    return name


def _blocks(loaded: Loaded, method: Method) -> Blocks:
    """Return the model's blocks; raise UserError where none of them can be skipped."""
    s, adapter = loaded.settings, loaded.adapter
    if s.method.get("objective") == "f1":
        raise _refused(loaded, "method.objective=f1 generates answers by the whole model")
    if adapter is not None and adapter.num_places:
        raise _refused(loaded, "a prefix has keys and values in every block")
    if loaded.device_map is not None:
        raise _refused(loaded, "model.device_map has blocks on several devices")
    if method.mode == "train" and _drops(loaded.model.config.to_dict()):
        raise _refused(loaded, "in training the model drops activations at random, anew each step")
    if (blocks := blocks_of(loaded.model)) is None:
        raise _refused(loaded, f"{type(loaded.model).__name__} is not one of {NAMES}")
    return blocks


def _drops(config: Mapping[str, Any]) -> bool:
    """Say whether a model has a dropout that is switched on in training."""
    return any("drop" in key and bool(value) for key, value in config.items())


def _refused(loaded: Loaded, why: str, way_out: str = "") -> UserError:
    asked = str(loaded.settings.keep_inputs).lower()
    return UserError(f"keep_inputs={asked}: {why}: {way_out}leave keep_inputs out.")


@torch.no_grad()
def _check(loaded: Loaded, kept: KeptInputs, rows: Sequence[Candidates]) -> None:
    """Raise UserError unless rows are scored with what is kept as by the whole model."""
    scorer = loaded.scorer
    scorer.model.eval()
    for row in rows:
        if not row.full:
            continue
        with scorer.forward.whole():
            wanted = scorer.scores([row])
        given = scorer.scores([row])
        both = wanted.isfinite()
        if not torch.equal(both, given.isfinite()):
            raise _refused(loaded, f"row {row.id} has other scores than by the whole model")
        if not both.any():
            continue  # the first step says so, with its row
        difference = float((given - wanted)[both].abs().max())
        # Products of other shapes differ by a few units in the last place, a block that is left
        # out in the first digits: half of the digits lie between.
        compute = scorer.compute_dtype or loaded.dtype
        if difference > torch.finfo(compute).eps ** 0.5 * float(wanted[both].abs().max()):
            raise _refused(
                loaded,
                f"scores of row {row.id} from block {kept.first} on differ by {difference:.2g} "
                "from those of the whole model, which is more than rounding",
            )


def _tokens(row: Candidates) -> int:
    """Return how many states of a row are kept, at most."""
    of_base = 0 if row.base is None else row.base.num_tokens
    return row.num_tokens + (0 if is_one(row) else row.width) + of_base

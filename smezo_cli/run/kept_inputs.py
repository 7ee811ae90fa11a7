"""Keep what enters the first trained block, where a run asks for it (``keep_inputs``)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from smezo_cli.errors import UserError
from smezo_cli.files.space import check_space
from smezo_cli.machine.memory import available_bytes
from smezo_cli.machine.waiting import waiting
from smezo_cli.methods.base import Method
from smezo_cli.models.blocks import Blocks, begin_at
from smezo_cli.run import input_cache
from smezo_cli.run.begin import Run
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.rows import Rows
from smezo_cli.scoring.batching import batches_of_like_length
from smezo_cli.scoring.candidates import Candidates, is_one
from smezo_cli.scoring.kept_inputs import KeptInputs, KeptRows
from smezo_cli.scoring.parts import of_one_part

BUDGET = 4  # what is kept may take one part in so many of the memory that is free

_OUT = "leave keep_inputs out"


def check(run: Run, loaded: Loaded, method: Method) -> None:
    """Refuse ``keep_inputs=true`` where that cannot be, before any row is scored.

    Raises:
        UserError: it cannot be.
    """
    if run.settings.keep_inputs is True:
        _begin_at(loaded, method)


def start(run: Run, loaded: Loaded, method: Method) -> None:
    """Let steps and evaluations begin at the first trained block, if asked to and where they can.

    Evaluations of the untouched model compute all blocks, and keep what enters that one for later.
    """
    if run.settings.keep_inputs is False:
        if run.settings.cache_inputs:
            run.say("  kept    nothing in the cache: keep_inputs=false")
        return
    try:
        begin(loaded, method, run.folder.path, 1 if run.team is None else run.team.size, run.say)
    except UserError as error:  # of keep_inputs=auto
        run.say(f"  kept    nothing: {error}")
        return
    if run.team is not None:
        run.team.tell("keep_inputs", folder=str(run.folder.path.absolute()))


def settle(run: Run, loaded: Loaded, rows: Rows) -> None:
    """Check the scores of two rows, and say how much will be kept.

    Raises:
        UserError: the disk is too full; or scores would be others.
    """
    if (kept := loaded.scorer.forward.kept) is None:
        return
    with waiting("checking what is kept of two rows"):
        compute_together(loaded, rows.train)
        _check(loaded, kept, of_one_part(rows.train)[:2])
    # Test is kept by now if it will be; dev, if its prompt was chosen by its scores.
    to_come = [*rows.train, *([] if kept.has_batches("dev") else rows.dev)]
    size = kept.rows.held_bytes + kept.rows.file_bytes
    size += kept.token_bytes * sum(map(_tokens, to_come))
    held = min(size, kept.rows.budget)
    where = f"{held / 1e6:.1f} MB in memory"
    if size > held:
        left = size - held - kept.rows.file_bytes
        check_space(run.folder.path, max(0, left), "what keep_inputs keeps", _OUT)
        where += f", {(size - held) / 1e6:.1f} MB in the run folder"
    cached = ", and in the cache for other runs" if kept.cache is not None else ""
    run.say(
        f"  kept    what enters block {kept.first} of {kept.num_blocks}, once a row (at most "
        f"{where}{cached}): steps begin there"
    )


def compute_together(loaded: Loaded, train: Sequence[Candidates]) -> None:
    """Compute training rows of like length in one forward, in the batches of an evaluation."""
    kept, scorer = loaded.scorer.forward.kept, loaded.scorer
    if kept is None or not scorer.batching.pads:
        return
    rows = list(dict.fromkeys(ids for row in train if (ids := _trained(row))))
    lots = batches_of_like_length([len(ids) for ids in rows], scorer.most_tokens)
    kept.compute_together([[rows[i] for i in chosen] for chosen in lots])


def name_of(split: str, part: str, prompt: int | None) -> str:
    """Return the name under which the batches of an evaluation are kept.

    Args:
        split: of the rows.
        part: of a mixture; "" for a single task.
        prompt: that may be chosen; None: the chosen one.
    """
    return f"{split} {part} {'' if prompt is None else prompt}"


def is_of(loaded: Loaded, as_it_came: bool) -> bool:
    """Return whether what is kept is of the model as it computes: not without its adapter.

    Args:
        loaded: the model.
        as_it_came: it computes without its adapter, if it has one.
    """
    return not as_it_came or loaded.adapter is None


def forget(loaded: Loaded, name: str) -> None:
    """Drop what evaluations of a name have kept, which are not made again."""
    if (kept := loaded.scorer.forward.kept) is not None:
        kept.forget(name)


def begin(
    loaded: Loaded,
    method: Method,
    folder: Path,
    ranks: int,
    say: Callable[[str], None] = lambda _: None,
) -> KeptInputs:
    """Let the model's forwards begin at the first block that the method trains.

    Args:
        loaded: the model.
        method: trains it.
        folder: takes what is too much for the memory.
        ranks: that take memory; they may all be on this machine.
        say: receives lines about the cache.

    Raises:
        UserError: that cannot be.
    """
    blocks, first = _begin_at(loaded, method)
    if not folder.is_dir():  # of another machine
        folder = Path.cwd()
    looks_ahead = loaded.settings.model["family"] == "masked"
    rows = KeptRows(available_bytes() // (BUDGET * ranks), folder)
    cache = input_cache.of(loaded, blocks, first, say)
    kept = KeptInputs(blocks.body, blocks.modules, first, looks_ahead, rows, cache)
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


def _begin_at(loaded: Loaded, method: Method) -> tuple[Blocks, int]:
    s = loaded.settings
    return begin_at(loaded.model, method.trained, s.method, asked=s.keep_inputs, mode=method.mode)


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
            raise UserError(
                f"keep_inputs: row {row.id} has other scores than by the whole model: {_OUT}."
            )
        if not both.any():
            continue  # the first step says so, with its row
        difference = float((given - wanted)[both].abs().max())
        # Products of other shapes differ by a few units in the last place, a block that is left
        # out in the first digits: half of the digits lie between.
        compute = scorer.compute_dtype or loaded.dtype
        if difference > torch.finfo(compute).eps ** 0.5 * float(wanted[both].abs().max()):
            raise UserError(
                f"keep_inputs: scores of row {row.id} from block {kept.first} on differ by "
                f"{difference:.2g} from those of the whole model, which is more than rounding: "
                f"{_OUT}."
            )


def _trained(row: Candidates) -> tuple[int, ...]:
    """Return the sequence that a step asks for; () where it asks for several."""
    if row.mask is not None:
        return row.context
    if row.kind == "classification":
        return row.full[0][:-1] if row.shares_prefix else ()
    return row.full[row.gold][:-1] if row.gold >= 0 else ()


def _tokens(row: Candidates) -> int:
    """Return how many states of a row are kept, at most."""
    of_base = 0 if row.base is None else row.base.num_tokens
    return row.num_tokens + (0 if is_one(row) else row.width) + of_base

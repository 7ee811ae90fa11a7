"""Give a method its mask: that of an earlier start, that of another run, or one made now."""

import random
import time
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from smezo_cli.config.build import target_of
from smezo_cli.config.method_keys import trait
from smezo_cli.errors import UserError
from smezo_cli.machine.out_of_memory import OutOfMemory, detecting_out_of_memory
from smezo_cli.models.modalities import without_unread
from smezo_cli.models.quantised import freeze_as_codes
from smezo_cli.run.begin import Run
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.rows import short_enough
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.parts import by_part
from smezo_cli.store import mask
from smezo_cli.store.mask import NAME
from smezo_cli.tasks import Prompt
from smezo_cli.tasks.mixture import Prompts
from smezo_cli.zo.quantised import linear_layers
from smezo_cli.zo.selections.layers import frozen
from smezo_cli.zo.targets import select


def settle(run: Run, loaded: Loaded) -> None:
    """Give the method of a run its mask, and keep it in the folder for later starts.

    Raises:
        UserError: there is none to be had, or the disk is full.
        NonFiniteLoss: a loss of the model as it came is not finite.
    """
    node = run.settings.method
    if not trait(node, "needs_mask", default=False):
        return
    path, source = run.folder.path / NAME, node["mask_from"]
    parameters = _trainable(loaded)
    model = _described(loaded, parameters)
    index = None
    if path.exists():
        try:
            index, where = mask.read(path, model), "of an earlier start"
        except UserError as error:
            run.say(f"  {error}")
    if index is None and source is not None:
        index, where = _of_another(source, model), f"of {source}"
    if index is None:
        start = time.perf_counter()
        rows = _rows(loaded, node["mask_rows"])
        index = _made(loaded, parameters, rows)
        spent = time.perf_counter() - start
        where = f"of the gradients of {sum(map(len, rows.values()))} training rows, {spent:.3g} s"
    if where != "of an earlier start":
        mask.write(path, index, model)
    loaded.index = index
    run.say(
        f"  mask    {sum(map(len, index.values()))} entries of {len(index)} of {len(parameters)} "
        f"tensors, {where}"
    )
    del parameters
    if line := _hold_codes(loaded):
        run.say(line)


def use(loaded: Loaded, folder: Path) -> None:
    """Give a method that needs one the mask that a finished run keeps, if it has none yet.

    Raises:
        UserError: it is missing, damaged, or of another model.
    """
    if trait(loaded.settings.method, "needs_mask", default=False) and loaded.index is None:
        loaded.index = mask.read(folder / NAME, _described(loaded, _trainable(loaded)))
        _hold_codes(loaded)


def holds_codes(loaded: Loaded) -> bool:
    """Return whether the frozen weights beside the mask are codes."""
    return loaded.settings.method.get("frozen_bits") is not None


def _hold_codes(loaded: Loaded) -> str:
    """Hold the weights beside the mask as codes, if that is asked for; return a line about it."""
    if not holds_codes(loaded):
        return ""
    assert loaded.index is not None
    loaded.of_base = loaded.fingerprint()
    bits, index = loaded.settings.method["frozen_bits"], loaded.index
    names = {f"{name}.weight" for name in linear_layers(loaded.model, trained=False)}
    around = {name: places for name, places in index.items() if name in names}
    try:
        freeze_as_codes(loaded.model, around, bits=bits)
    except ValueError as error:
        raise UserError(f"method: {error}.") from error
    size = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    kept = sum(map(len, around.values()))
    return (
        f"  codes   {len(names)} linear layers in {bits} bits around {kept} entries: "
        f"{size / 1e6:.1f} MB"
    )


def _trainable(loaded: Loaded) -> dict[str, nn.Parameter]:
    try:
        node = without_unread(loaded.settings.method, loaded.model, loaded.unread)
        targets = select(loaded.model, frozen(loaded.model, node), [])
    except ValueError as error:
        raise UserError(f"method: {error}.") from error
    return {target.name: target.parameter for target in targets}


def _described(loaded: Loaded, parameters: dict[str, nn.Parameter]) -> mask.Model:
    shapes = {name: list(p.shape) for name, p in parameters.items()}
    return mask.Model(shapes, loaded.settings.dtype, loaded.fingerprint())


def _of_another(source: str, model: mask.Model) -> Any:
    path = Path(source)
    path = path / NAME if path.is_dir() else path
    try:
        return mask.read(path, model)
    except UserError as error:
        raise UserError(f"method.mask_from={source}: {error}") from error


def _rows(loaded: Loaded, count: int) -> dict[str, list[Candidates]]:
    """Return so many training rows, of each part of a mixture, under the first prompt.

    The seed alone decides which ones; those that are too long to be trained on are left out.

    Raises:
        UserError: all are too long.
    """
    first = {name: prompts[0] for name, prompts in by_part(loaded.prompts).items()}
    prompt: Prompt | Prompts = first[""] if "" in first else Prompts(first)
    drawn = []
    for name, of_part in by_part(loaded.task.train).items():
        drawing = random.Random(f"{loaded.settings.seed}/mask/{name}")
        drawn += drawing.sample(of_part, min(count, len(of_part)))
    found = short_enough(loaded.encode(drawn, prompt), loaded)
    rows = by_part(found)
    if lacking := [name for name in by_part(drawn) if name not in rows]:
        where = f"{lacking[0]}: " if lacking[0] else ""
        raise UserError(
            f"method.mask_rows={count}: {where}none of these training rows is short enough for "
            "task.max_train_tokens: raise one of the two."
        )
    return rows


def _made(
    loaded: Loaded, parameters: dict[str, nn.Parameter], rows: dict[str, list[Candidates]]
) -> Any:
    settings, scorer = loaded.settings.method, loaded.scorer
    losses = {
        name: [partial(scorer.loss, [row]) for row in of_part] for name, of_part in rows.items()
    }
    choose: Any = target_of(settings, "method")
    scorer.model.eval()
    try:
        with detecting_out_of_memory():
            return choose.choose(loaded.model, parameters, losses, settings)
    except ValueError as error:
        raise UserError(f"method: {error}.") from error
    except OutOfMemory as error:
        raise UserError(
            f"the memory is too small to make a mask by backpropagation of one row ({error}): "
            "make it on a larger machine and give it by method.mask_from=FILE."
        ) from error

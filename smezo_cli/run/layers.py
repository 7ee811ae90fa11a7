"""Find the dominant layer of a model for ``method.layers=dominant``, once, and note which it is."""

import dataclasses
import random
from collections.abc import Mapping
from functools import partial
from typing import Any

from omegaconf import DictConfig

from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError
from smezo_cli.machine.out_of_memory import OutOfMemory, detecting_out_of_memory
from smezo_cli.run.begin import Run
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.rows import short_enough
from smezo_cli.scoring.parts import by_part
from smezo_cli.store.notes import Notes
from smezo_cli.store.values import Dominant
from smezo_cli.tasks.mixture import Prompts
from smezo_cli.zo import outliers

DOMINANT = "dominant"

_ROWS = 4  # training rows of a task, or of each part of a mixture, that are computed


def is_asked(method: Mapping[str, Any]) -> bool:
    """Return whether the dominant layer alone is to be trained."""
    return method.get("layers") == DOMINANT


def settle(run: Run, loaded: Loaded) -> None:
    """Give the method of a run the number of the dominant layer: the noted one, or find it now.

    Raises:
        UserError: there is none, or the memory is too small for a row.
    """
    if not is_asked(run.settings.method):
        return
    found, where = run.notes.get("dominant_layer"), ", found at an earlier start"
    if found is None:
        where = ""
        found = run.notes["dominant_layer"] = _found(loaded)
    loaded.settings = resolved(loaded.settings, found)
    run.say(f"  layers  {words(found)}{where}")


def words(found: Dominant) -> str:
    """Return which layer was found, and why, in words."""
    return (
        f"block {found['block']} of {found['num_blocks']} alone: the first whose output has an "
        f"entry above {found['factor']:g} times its median ({found['ratio']:.3g} times)"
    )


def noted(method: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
    """Return what result.json says of it: nothing where nobody asked."""
    return {"dominant_layer": notes.get("dominant_layer")} if is_asked(method) else {}


def resolved(settings: Settings, found: Mapping[str, Any] | None) -> Settings:
    """Return the settings with the number of the dominant layer in place of its name.

    Args:
        settings: of a run.
        found: what the run noted; None: nothing.

    Raises:
        UserError: the number is needed, and was not noted.
    """
    if not is_asked(settings.method):
        return settings
    if found is None:
        raise UserError(
            "method.layers=dominant: this run has not noted which layer that is: finish it with "
            "smezo train, or give the number of a block."
        )
    method = {**settings.method, "layers": [found["block"]]}
    return dataclasses.replace(settings, method=method)


def with_numbers(cfg: DictConfig, settings: Settings) -> DictConfig:
    """Return settings of a run with the number of its dominant layer, for who has no note of it.

    Args:
        cfg: the settings as they were given.
        settings: the same, from :func:`resolved`.
    """
    found = cfg.copy()
    if is_asked(found.method):
        found.method.layers = settings.method["layers"]
    return found


def _found(loaded: Loaded) -> Dominant:
    """Compute some training rows under the first prompt; return the dominant layer."""
    first = {name: prompts[0] for name, prompts in by_part(loaded.prompts).items()}
    rows = []
    for name, of_part in by_part(loaded.task.train).items():
        drawing = random.Random(f"{loaded.settings.seed}/layers/{name}")
        drawn = drawing.sample(of_part, min(_ROWS, len(of_part)))
        prompt = first[name] if "" in first else Prompts({name: first[name]})
        encoded = loaded.encode(drawn, prompt)
        rows += short_enough(encoded, loaded) or encoded[:1]
    scorer = loaded.scorer
    scorer.model.eval()
    try:
        with detecting_out_of_memory():
            found = outliers.ratios(loaded.model, [partial(scorer.loss, [row]) for row in rows])
        block = outliers.dominant(found)
    except ValueError as error:
        raise UserError(f"method.layers=dominant: {error}.") from error
    except OutOfMemory as error:
        raise UserError(
            f"the memory is too small to compute one row ({error}): give method.layers the number "
            "of a block."
        ) from error
    return {
        "block": block,
        "num_blocks": len(found),
        "ratio": found[block],
        "factor": outliers.FACTOR,
    }

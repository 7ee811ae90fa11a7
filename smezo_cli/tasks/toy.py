"""Generate a small task for tests and first runs: film sentences, good or bad."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smezo_cli.tasks.base import Row, Tables, permute

NOUNS = ("film", "plot", "cast", "score", "ending", "dialogue", "camera", "pace", "joke", "hero")
WORDS = (
    ("dull", "awful", "stale", "clumsy", "bleak", "tedious"),
    ("lovely", "warm", "clever", "fresh", "bright", "moving"),
)


def read(cfg: Mapping[str, Any], cache: Path) -> Tables:
    """Return 300 sentences `the NOUN was WORD and WORD`, both words of a class; a third is test."""
    rows = [
        Row({"text": f"the {noun} was {first} and {second}"}, label, f"{noun}/{first}/{second}")
        for label in (0, 1)
        for noun, (first, second) in itertools.product(
            NOUNS, itertools.combinations(WORDS[label], 2)
        )
    ]
    mixed = permute(rows, data_seed=0)
    third = len(rows) // 3
    return Tables(
        train=mixed[third:],
        test=mixed[:third],
        fields=("text",),
        classes=("bad", "good"),
        source="built in",
    )

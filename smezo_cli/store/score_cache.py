"""Keep the scores of untouched models in the cache folder, for other runs that would repeat them.

    CACHE/scores/DIGEST.json

Zero-shot scores and those of the choice of a prompt are the same for every seed and method of a
sweep. The digest is over everything that they follow from: all weights and the configuration of the
model, the rows with their tokens, what the machine computes with, and versions. The file says the
same in full and is sealed by a SHA-256. One that is damaged, or of something else, is written anew.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smezo_cli.errors import UserError
from smezo_cli.files import atomic, bounded
from smezo_cli.files.sealed import sealed, unsealed
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.store.partial_scores import Part, keys_of


class ScoreCache:
    """Look up and store the scores of evaluations that follow from the same things.

    Args:
        folder: of all such files; it is made when the first one is written.
        about: plain JSON: what scores follow from, beside the rows.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._folder = folder
        self._about: dict[str, Any] = json.loads(json.dumps(about))

    def path_of(self, rows: Sequence[Candidates]) -> Path:
        """Return the file of an evaluation."""
        text = json.dumps(self._all_about(rows), sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def fill(self, part: Part, rows: Sequence[Candidates]) -> bool:
        """Fill in all that an evaluation of the rows finds, if it is known; return whether it is.

        Args:
            part: of which nothing is known.
            rows: all of the evaluation.
        """
        content = unsealed(bounded.read_json(self.path_of(rows)) or {})
        if content is None or content.get("about") != self._all_about(rows):
            return False
        try:
            scores = torch.tensor(
                [[-math.inf if x is None else x for x in row] for row in content["scores"]]
            )
            texts = [str(text) for text in content["texts"]]
        except (LookupError, TypeError, ValueError):
            return False
        if len(scores) != len(rows) or len(texts) not in (0, len(rows)):
            return False
        part.scores, part.scored = scores, set(range(len(rows)))
        part.texts = dict(enumerate(texts))
        part.answered = set(part.texts)
        return True

    def keep(self, rows: Sequence[Candidates], scores: Tensor, texts: Sequence[str]) -> None:
        """Write what an evaluation has found.

        Raises:
            UserError: the file cannot be written.
        """
        path = self.path_of(rows)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}.") from error
        # A float32 is a double of JSON, exactly; what is minus infinity becomes null.
        content = {
            "about": self._all_about(rows),
            "scores": scores.tolist(),
            "texts": list(texts),
        }
        atomic.write_text(path, json.dumps(sealed(content)), is_shared=True)

    def _all_about(self, rows: Sequence[Candidates]) -> dict[str, Any]:
        keys = keys_of("", rows)
        return self._about | {"rows": hashlib.sha256("".join(keys).encode()).hexdigest()}

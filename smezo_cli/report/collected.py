"""Write what a table takes of each run to a small JSON file that can be committed; read it back.

A file has the command, the settings without paths, the evaluations on dev, the outcome of each test
row, what result.json says and a SHA-256 of all of it, but not where the run was. No torch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smezo_cli.errors import UserError, redacted_tree
from smezo_cli.files import bounded, sealed, strict_json
from smezo_cli.files.atomic import write_text
from smezo_cli.report.runs import Floats, Run
from smezo_cli.store import schema

_SCHEMA = 1
# Keys of result.json: command and error may name folders, and a file has a digest of its own.
_LEFT_OUT = ("command", "error", "sha256")
_FOLDERS = ("task.data_dir", "model.path", "runs_dir")
_ABSOLUTE = re.compile(r"(/|~/|file:|[A-Za-z]:[\\/])[^\s/].*")  # folder names may have spaces


def find(folder: Path) -> tuple[list[Run], list[str]]:
    """Return the runs of the files in a folder, by name, and a note for each other file.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(
            f"--results {folder}: there is no such folder; smezo table ID --collect {folder} "
            "writes one from runs."
        )
    runs, notes = list[Run](), list[str]()
    for path in sorted(folder.glob("*.json")):
        run = load(path)
        if run is None:
            notes.append(
                f"{path} is left out: it is not what smezo table --collect wrote (damaged, or "
                "changed since)."
            )
        else:
            runs.append(run)
    return runs, notes


def load(path: Path) -> Run | None:
    """Return the run of a file, or None if the file is not as it was written."""
    found = bounded.read_json(path)
    found = None if found is None else sealed.unsealed(found)
    if found is None or found.get("schema") != _SCHEMA:
        return None
    result, settings = found.get("result"), found.get("settings")
    looks: Any = found.get("looks")
    if not (isinstance(result, dict) and isinstance(settings, dict) and schema.is_looks(looks)):
        return None
    if not schema.is_sound_result(result):
        return None
    try:
        outcomes = _outcomes_of(found.get("outcomes"))
    except ValueError:
        return None
    labelled = None if outcomes is None else int((~np.isnan(outcomes)).sum())
    if labelled is not None and labelled != (result.get("test") or {}).get("n"):
        return None
    return Run(path, result, settings, tuple((int(step), float(f)) for step, f in looks), outcomes)


def _outcomes_of(text: object) -> Floats | None:
    """Read the outcome of each test row (nan: no label) from text; None in files that lack them."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError("not text")
    words = text.split() if "." in text else list(text)
    found = np.array([float(word) for word in words], dtype=np.float64)
    if not (len(found) and (np.isnan(found) | ((found >= 0) & (found <= 1))).all()):
        raise ValueError("not in [0, 1]")
    return found


def _text_of(outcomes: Floats) -> str:
    """Write outcomes as a digit a row if each is right or wrong, else as numbers with blanks."""
    if np.isin(outcomes, (0, 1)).all():
        return "".join("1" if row else "0" for row in outcomes)
    return " ".join(map(repr, outcomes.tolist()))


def write(
    folder: Path, name: str, run: Run, settings: Mapping[str, Any], words: Sequence[str]
) -> bool:
    """Write the file of a run; return False if the same file is there already.

    Args:
        folder: made if it is not there.
        name: of the file, less its ending.
        run: from its folder, or from such a file.
        settings: those of the run that say what was asked, without paths.
        words: what follows `smezo train` on its line.

    Raises:
        UserError: it cannot be written, or would say where something lies on this machine.
    """
    of_before = run.collected is not None and run.collected_outcomes is None
    has_rows = run.result["status"] == "done" and not of_before
    named = [word for word in words if word.partition("=")[0] not in _FOLDERS]
    content = redacted_tree(
        {
            "schema": _SCHEMA,
            "command": ["smezo", "train", *named],
            "settings": settings,
            "looks": run.evaluations(),
            "outcomes": _text_of(run.outcomes()["test"]) if has_rows else None,
            "result": {key: v for key, v in run.result.items() if key not in _LEFT_OUT},
        }
    )
    for key, text in _texts(content):
        if _ABSOLUTE.fullmatch(text.partition("=")[2] if key == "command" else text):
            raise UserError(
                f"--collect {folder}: {run.path} cannot be collected, for its {key} is a place on "
                f"this machine ({text}); give it a relative path and repeat the run."
            )
    path = folder / f"{name}.json"
    text = strict_json.dumps(sealed.sealed(content), indent=1) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file() and bounded.read_text(path, 1 << 26) == text:
            return False
    except OSError as error:
        raise UserError(f"--collect {folder}: it cannot be made ({error.strerror}).") from error
    write_text(path, text)
    return True


def _texts(node: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text below a node with its dotted key."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _texts(value, f"{key}.{name}".lstrip("."))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value, key)
    elif isinstance(node, str):
        yield key, node

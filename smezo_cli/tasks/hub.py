"""Load data sets of the hub, or say what else can be done."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from smezo_cli.errors import UserError, first_line
from smezo_cli.files.fetch import hub_answers
from smezo_cli.tasks.files import Record


@dataclass(frozen=True)
class HubTable:
    """Hold one split of a data set.

    Attributes:
        rows: its records; class labels are numbers, -1 a hidden one.
        class_names: by column of class labels, the word of each number.
        where: names the split in messages.
        commit: the commit it was loaded from, 40 hex digits; "" where the library does not say.
    """

    rows: Any
    class_names: Mapping[str, list[str]]
    where: str
    commit: str

    def records(self, *, words: bool = True) -> Iterator[Record]:
        """Yield records with their class labels as words, or as the numbers that are stored."""
        names = self.class_names if words else {}
        for number, value in enumerate(self.rows, start=1):
            known = {c: n[value[c]] for c, n in names.items() if value[c] in range(len(n))}
            yield Record(f"{self.where}, row {number}", number, value | known)


def load_hub(
    path: str, name: str | None, revision: str, split: str, *, task: str, cure: str
) -> HubTable:
    """Load one split of a data set, from the hub or its cache.

    Raises:
        UserError: the hub cannot be reached, or cannot load it; the message ends in `cure`.
    """
    import datasets  # type: ignore[import-untyped]  # the library ships no types
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # documented there

    # Offline mode of the hub's library means: take what its cache has.
    if not constants.HF_HUB_OFFLINE and not hub_answers():
        raise UserError(
            f"task {task}: the hub cannot be reached for {path}; connect to the network "
            f"(HF_HUB_OFFLINE=1 uses what was loaded before), or {cure}."
        )
    try:
        table = datasets.load_dataset(path, name, revision=revision, split=split)
    except (
        OSError,
        ValueError,
        RuntimeError,
        HTTPError,
        datasets.exceptions.DatasetsError,
    ) as error:
        # RuntimeError: a data set that is a script; HTTPError: the connection broke.
        raise UserError(
            f"task {task}: {path} could not be loaded ({first_line(error)}); {cure}."
        ) from error
    names = {
        column: feature.names
        for column, feature in table.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    # The library keeps where each file came from: hf://datasets/OWNER/NAME@COMMIT/FILE.
    sources = " ".join(table.info.download_checksums or ())
    commits = set(re.findall(r"@([0-9a-f]{40})/", sources))
    where = " ".join(word for word in (path, name, split) if word)
    return HubTable(table, names, where, commits.pop() if len(commits) == 1 else "")

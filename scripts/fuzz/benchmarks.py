"""Kind `benchmarks`: the benchmarks' own files below task.data_dir."""

import json
from typing import Any

from fuzz.cases import Case, kind
from fuzz.fixtures import settings_of
from fuzz.hostile import as_json, spoil_bytes, spoil_tree
from fuzz.tables import read_rows

_BENCHMARKS: dict[str, list[dict[str, Any]]] = {
    "rte": [
        {"premise": f"p {i}", "hypothesis": "h", "label": "entailment", "idx": i} for i in range(8)
    ],
    "boolq": [{"passage": "p", "question": f"q {i}", "label": i % 2 == 0} for i in range(8)],
    "copa": [
        {"premise": "p.", "choice1": "a", "choice2": f"b {i}", "question": "cause", "label": i % 2}
        for i in range(8)
    ],
    "multirc": [
        {
            "passage": {
                "text": "t",
                "questions": [{"question": "q", "answers": [{"text": f"a {i}", "label": 1}]}],
            }
        }
        for i in range(8)
    ],
    "record": [
        {
            "passage": {
                "text": "Ann met Bob.\n@highlight\nx",
                "entities": [{"start": 0, "end": 2}],
            },
            "qas": [{"query": "@placeholder met", "answers": [{"text": "Ann"}]}],
        }
        for _ in range(8)
    ],
    "wsc": [
        {
            "text": "Ann met Bob",
            "label": True,
            "target": {"span1_text": "Ann", "span2_text": "Bob", "span1_index": 0},
        }
        for _ in range(8)
    ],
}


@kind(3)
def benchmarks(case: Case) -> None:
    """The benchmarks' own files below task.data_dir."""
    name = case.pick(list(_BENCHMARKS))
    node = dict(settings_of(f"task={name}", "model=tiny-llama", "task.data_dir=in").task)
    node |= {"num_train": 4, "num_dev": 2, "num_test": 2, "data_dir": "in"}
    folder = case.folder / "in"
    for split in ("train", "test"):
        rows = json.loads(json.dumps(_BENCHMARKS[name]))
        if split == "train" or case.chance(0.2):
            rows = spoil_tree(case, rows)
        data = b"\n".join(map(as_json, rows if isinstance(rows, list) else [rows]))
        if case.chance(0.4):
            data = spoil_bytes(case, data)
        file = folder / node["source"]["files"][split]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    read_rows(case, node)

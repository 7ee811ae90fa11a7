"""Commands of runs of tiny models, and what these leave, read and compared."""

import json
from pathlib import Path
from typing import Any

SMALL = ["task=toy", "task.num_train=32", "task.num_dev=16", "task.num_test=24", "device=cpu"]
BATCH_SIZE = 4
SHORT = ["steps=12", f"batch_size={BATCH_SIZE}", "eval_every=3"]
# The step sizes make weights and losses move; thresholds that are renewed are part of the state.
# executor=auto would measure by losses of its own, and faults come at the n-th loss.
SEQUENTIAL = "method.executor=sequential"
METHODS = {
    "mezo": ["model=tiny-opt", "method=mezo", "lr=1e-3", SEQUENTIAL],
    "sparse_mezo": [
        *("model=tiny-llama", "method=sparse_mezo", "lr=1e-3", SEQUENTIAL),
        *("sparsity=0.6", "method.mask_refresh_every=5"),
    ],
    "mezo_adam": [
        *("model=tiny-llama", "method=mezo_adam", "lr=1e-2", SEQUENTIAL),
        "full_save_every=5",
    ],
    # So large a step that the best look is not the last.
    "adamw": ["model=tiny-opt", "method=adamw", "lr=3e-2"],
    "sgd": ["model=tiny-llama", "method=sgd", "lr=1e-2", "method.optimizer.momentum=0.9"],
}
EXACT = ["sparse_mezo", "mezo_adam", "adamw"]  # the methods that are killed and stopped


def words_of(method: str, *more: str) -> list[str]:
    return [*SMALL, *SHORT, *METHODS[method], *more]


def run_folder(cwd: Path, name: str = "default") -> Path:
    """The one run folder in cwd/runs/name."""
    (found,) = (path for path in (cwd / "runs" / name).iterdir() if path.is_dir())
    return found


def result_of(folder: Path) -> dict[str, Any]:
    loaded = json.loads((folder / "result.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


def state_of(folder: Path) -> dict[str, Any]:
    loaded = json.loads((folder / "checkpoint" / "state.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


def records_of(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without seconds."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


CLOCKS_AND_BYTES = {"started", "ended", "train_seconds", "peak_memory_bytes", "command", "sha256"}
OF_METRICS = {"metrics_bytes", "metrics_sha256"}  # its lines have seconds in them


def assert_same_run(folder: Path, other: Path) -> None:
    """The same files; weights, scores and metrics bit for bit, all of the result but clocks."""
    names = [{str(p.relative_to(of)) for p in of.rglob("*")} for of in (folder, other)]
    assert names[0] == names[1]
    for pattern in ("checkpoint/*.safetensors", "scores.safetensors"):
        files, others = (sorted(path.glob(pattern)) for path in (folder, other))
        assert [path.name for path in files] == [path.name for path in others]
        assert files or "icl" in folder.name
        for mine, theirs in zip(files, others, strict=True):
            assert mine.read_bytes() == theirs.read_bytes(), mine.name
    assert records_of(folder) == records_of(other)
    results = [
        {k: v for k, v in result_of(path).items() if k not in CLOCKS_AND_BYTES}
        for path in (folder, other)
    ]
    for result in results:
        del result["versions"]["commit"]  # who works on the checkout meanwhile changes it
    assert results[0] == results[1]
    states = [
        {k: v for k, v in state_of(path).items() if k not in (*CLOCKS_AND_BYTES, *OF_METRICS)}
        for path in (folder, other)
    ]
    assert states[0] == states[1]


def flip(path: Path, share: float) -> None:
    """Turn one bit over, so far into the file."""
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 16
    path.write_bytes(content)

"""What every method computes today: a change of layout must leave all of it as it is.

`python tests/golden/test_golden.py` writes runs.json anew; whoever does that says in CHANGELOG.md,
under "Numbers changed", what changed and why.
"""

import contextlib
import hashlib
import io
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from smezo_cli import train
from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.method import build_method
from smezo_cli.store.saved import tensors_digest
from smezo_cli.store.trajectory import read
from smezo_cli.zo.optimizer import ZeroOrder

GOLDEN = Path(__file__).with_name("runs.json")
COMMON = [
    "model=tiny-llama",
    "task=toy",
    "task.num_train=32",
    "task.num_dev=16",
    "task.num_test=24",
    "device=cpu",
    "batch_size=4",
    "steps=20",
    "eval_every=5",
    "compile=auto",
]
_STEP = "method.executor=sequential"  # auto times, and notes what was faster
# Step sizes that move weights and losses.
CASES = {
    "mezo": f"method=mezo lr=1e-3 {_STEP}",
    "mezo-opt": f"method=mezo model=tiny-opt lr=1e-3 {_STEP} batch_order=stratified",
    "mezo-signs": (
        f"method=mezo lr=1e-3 method.noise=rademacher method.clip_projected_grad=1.0 {_STEP}"
    ),
    "sparse-refreshed": f"method=sparse_mezo lr=1e-3 method.mask_refresh_every=5 {_STEP}",
    "sparse-large": f"method=sparse_mezo lr=1e-3 method.mask=large sparsity=0.6 {_STEP}",
    "sparse-random": (
        f"method=sparse_mezo lr=1e-3 method.mask=random method.mask_resample=step {_STEP}"
    ),
    "sparse-bfloat16": (
        "method=sparse_mezo lr=1e-3 eps=1e-2 dtype=bfloat16 method.rounding=stochastic "
        f"method.num_queries=2 {_STEP}"
    ),
    "in-place": "method=sparse_mezo lr=1e-3 method.executor=in_place method.weight_decay=0.1",
    "lockstep": "method=sparse_mezo lr=1e-3 method.executor=lockstep",
    "adam": f"method=mezo_adam lr=1e-2 full_save_every=5 {_STEP}",
    "accuracy": f"method=mezo lr=1e-3 eps=0.1 method.objective=accuracy {_STEP}",
    "adamw": "method=adamw lr=3e-2",
    "sgd": "method=sgd lr=1e-2 method.optimizer.momentum=0.9 lr_schedule=linear",
    "lora": "method=lora lr=1e-2",
    "mezo-lora": f"method=mezo_lora lr=1e-2 {_STEP}",
    "sparse-lora": f"method=sparse_mezo_lora lr=1e-2 {_STEP}",
    "prefix": "method=prefix lr=1e-2",
    "mezo-prefix": f"method=mezo_prefix lr=1e-2 {_STEP}",
    "roberta": (
        "method=mezo model=tiny-roberta lr=1e-3 'task.prompt=\"{text}. It was {mask} .\"' "
        f"task.labels=[terrible,great] {_STEP}"
    ),
    "zero-shot": "method=zero_shot",
    "in-context": "method=icl method.num_demonstrations=4",
    "linear-probe": "method=linear_probe",
}
# Of a result: how long it took, on what, and by which versions.
_OF_THE_MACHINE = (
    *("train_seconds", "peak_memory_bytes", "started", "ended", "versions", "sha256", "command"),
    *("passes", "onednn_layers", "batching"),
)


def canary() -> str:
    """SHA-256 of the processor's name and of what its kernels make of some products and sums."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(33, 96, generator=generator) for _ in range(2))
    with torch.no_grad():
        values = [(x @ w.T).softmax(-1).log().sum(-1), functional.linear(x[:4], w).tanh().flatten()]
        values += [(x.bfloat16() @ w.bfloat16().T).float().flatten()]
        heads = x[:32].view(1, 4, 8, 96)
        values += [functional.scaled_dot_product_attention(heads, heads, heads).flatten()]
    digest = hashlib.sha256(torch.cat(values).numpy().tobytes())
    digest.update(torch.backends.cpu.get_cpu_capability().encode())
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        digest.update(next((line for line in lines if line.startswith("model name")), "").encode())
    return digest.hexdigest()


def made(name: str, folder: Path) -> dict[str, Any]:
    """Train a case below a folder; what it came to, in plain values."""
    given = shlex.split(CASES[name])
    keys = {word.partition("=")[0] for word in given}
    frozen = name in ("zero-shot", "in-context", "linear-probe")
    common = [
        word
        for word in COMMON
        if (key := word.partition("=")[0]) not in keys
        and not (frozen and key in ("batch_size", "steps", "eval_every"))
    ]
    words = [*common, *given, f"runs_dir={folder / name}"]
    with contextlib.redirect_stdout(io.StringIO()):
        train.run(compose(words))
    (run,) = (folder / name / "default").iterdir()
    result = json.loads((run / "result.json").read_text())
    for key in _OF_THE_MACHINE:
        result.pop(key, None)
    found: dict[str, Any] = {"folder": run.name, "result": result}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    if (run / "trajectory.bin").exists():
        steps = read(run / "trajectory.bin")
        found["identity"] = steps.header["identity"]
        found["columns"] = [[x.hex() for x in row] for row in steps.columns(len(steps)).tolist()]
    return found


def written() -> dict[str, Any]:
    """All cases, and on what processor they were made."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: made(name, Path(folder)) for name in CASES}
    return {"canary": canary(), "cases": cases}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GOLDEN.read_text())
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_a_run_computes_what_it_did(name: str, golden: dict[str, Any], tmp_path: Path) -> None:
    """On a processor with the same kernels bit for bit: weights, steps, metrics, digest, result."""
    found, wanted = made(name, tmp_path), golden["cases"][name]
    for key in ("folder", "identity"):
        assert found.get(key) == wanted.get(key)
    assert found["result"].keys() == wanted["result"].keys()
    if canary() == golden["canary"]:
        assert found == wanted
        return
    first, of_first = (of["metrics"][:1] for of in (found, wanted))
    assert [line.get("loss") for line in first] == pytest.approx(
        [line.get("loss") for line in of_first], abs=1e-4
    )
    assert found["result"]["num_forwards"] == wanted["result"]["num_forwards"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [n for n in CASES if "mezo" in n or n in ("adam", "lockstep")])
def test_recorded_steps_give_the_recorded_weights(name: str, golden: dict[str, Any]) -> None:
    """On any processor: base model, keys and projected gradients are all that weights need."""
    wanted = golden["cases"][name]
    given = shlex.split(CASES[name])
    keys = {word.partition("=")[0] for word in given}
    words = [*(w for w in COMMON if w.partition("=")[0] not in keys), *given]
    job = Loaded(check(compose(words)), "cpu", lambda line: None)
    if job.fingerprint() != wanted["result"]["model_fingerprint"]:
        pytest.skip("the first weights of the tiny model are others on this processor")
    method = build_method(job)
    assert isinstance(method, ZeroOrder)
    assert method.identity() == wanted["identity"]
    for lr, *projected_grad in zip(*wanted["columns"], strict=True):
        method.replay(float.fromhex(lr), [float.fromhex(g) for g in projected_grad])
    assert tensors_digest(method.trained) == wanted["result"]["weights"]["last"]["sha256"]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(written(), indent=1, sort_keys=True) + "\n", encoding="utf-8")

"""model.device_map: where layers go, and that numbers do not depend on it.

No GPU has run it. Devices that differ are tensors of the CPU that say so (several_devices.py), and
raise where two of them meet in one operation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model, hooks
from torch import Tensor

from smezo_cli.cli import bench
from smezo_cli.config.compose import compose
from smezo_cli.config.digest import digest
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.machine import device
from smezo_cli.machine.device import all_devices, choose_device
from smezo_cli.models import placement
from smezo_cli.models.adapter import attach
from smezo_cli.models.architecture import build_meta
from smezo_cli.models.placement import devices_of_modules
from smezo_cli.plan.planner import plan
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.method import build_method
from tests.several_devices import two_devices

GB = 10**9
SMALL = ["task=toy", "task.num_train=16", "task.num_dev=8", "task.num_test=8"]
LINE = [*SMALL, "model=tiny-llama", "method=mezo"]
LAYERS = "model.layers"


def line(*words: str) -> Any:
    return check(compose([*LINE, *words]))


# ------------------------------------------------------------------------------- the setting


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("+model.device_map=gpus", "must be auto, balanced, balanced_low_0, sequential or a map"),
        ("+model.device_map={lm_head: tpu}", "must be auto"),
        ("+model.device_map={}", "must be auto"),
        ("+model.device_map={model: 0, lm_head: cpu}", "'lm_head' on cpu: weights outside GPUs"),
        ("+model.device_map={model: 0, lm_head: disk}", "'lm_head' on disk: weights outside GPUs"),
        ("+model.device_map=auto device=cuda:1", "device=cuda:1 beside model.device_map"),
        ("+model.device_map=auto device=cpu", "device=cpu beside model.device_map"),
    ],
)
def test_one_sentence_refuses_what_cannot_be(words: str, said: str) -> None:
    first, *rest = words.split(" device=")
    with pytest.raises(UserError, match=said):
        line(first, *(f"device={word}" for word in rest))


def test_four_bits_lie_on_one_gpu() -> None:
    words = ["model=opt-125m", "method=mezo_lora", "+model.quantization=4bit"]
    with pytest.raises(UserError, match="4-bit weights lie on one GPU"):
        check(compose([*SMALL, *words, "+model.device_map=auto"]))


def test_what_knows_one_device_alone_says_so() -> None:
    settings = line("+model.device_map=auto")
    with pytest.raises(UserError, match="smezo plan knows one device"):
        plan(settings, capacity=GB)
    with pytest.raises(UserError, match="smezo bench measures on one device"):
        bench.main(["model=own", "model.path=/nowhere", "model.device_map=auto"])
    with pytest.raises(UserError, match=r"smezo bench takes no \+model.device_map"):
        bench.main(["model=tiny-llama", "+model.device_map=auto"])


def test_a_map_is_no_part_of_what_is_asked() -> None:
    asked = digest(compose(LINE))
    for device_map in ("auto", "{model: 0, lm_head: 1}", "null"):
        assert digest(compose([*LINE, f"+model.device_map={device_map}"])) == asked


def test_devices_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: 0)
    with pytest.raises(UserError, match="this machine has no GPU that torch can use"):
        choose_device("auto", "auto")
    assert choose_device("auto", {"": "cpu"}) == "cpu"
    monkeypatch.setattr(device, "_num_gpus", lambda: 2)
    assert all_devices("balanced") == ["cuda:0", "cuda:1"]
    assert choose_device("auto", {"model": "cuda:1", "lm_head": "cuda:0"}) == "cuda:0"
    with pytest.raises(UserError, match=r"this machine has GPUs 0 to 1 that torch can use"):
        all_devices({"": "cuda:2"})


# --------------------------------------------------------------------------------- which module


def places_of(name: str, way: str, *free: float) -> tuple[Any, dict[str, torch.device]]:
    settings = check(compose([*SMALL, f"model={name}", "method=mezo"]))
    model = build_meta(settings.model)
    given = {number: int(size * GB) for number, size in enumerate(free)}
    return model, devices_of_modules(model, way, given)


@pytest.mark.parametrize(
    ("name", "way", "free"),
    [
        ("opt-13b", "auto", (20, 20)),
        ("opt-30b", "balanced_low_0", (22, 22, 22, 22)),
        ("llama-30b", "auto", (70, 70)),
        ("llama-30b", "sequential", (40, 40)),
        ("roberta-large", "balanced", (1, 1)),
    ],
)
def test_a_large_model_lies_whole_within_what_is_free(
    name: str, way: str, free: Sequence[float]
) -> None:
    model, places = places_of(name, way, *free)
    of_tensor: dict[int, set[torch.device]] = {}
    used = dict.fromkeys(places.values(), 0)
    layers: dict[str, set[torch.device]] = {}
    for path, p in model.named_parameters(remove_duplicate=False):
        (at,) = (d for n, d in places.items() if path.startswith(f"{n}."))
        used[at] += 0 if id(p) in of_tensor else p.numel() * p.element_size()
        of_tensor.setdefault(id(p), set()).add(at)
        for block in model._no_split_modules:
            for outer, module in model.named_modules():
                if type(module).__name__ == block and path.startswith(f"{outer}."):
                    layers.setdefault(outer, set()).add(at)
    assert len(of_tensor) == len(list(model.parameters()))
    assert all(len(found) == 1 for found in of_tensor.values()), "a tied weight has two places"
    assert layers
    assert all(len(found) == 1 for found in layers.values()), "a block is split"
    assert len(used) > 1
    assert all(size <= free[at.index or 0] * GB for at, size in used.items())


def test_a_model_that_does_not_fit_says_what_lacks() -> None:
    said = r"of 65.1 GB of weights 24 modules \(model.layers.39 to lm_head\) .* 2 GPUs, where 44 GB"
    with pytest.raises(UserError, match=said):
        places_of("llama-30b", "auto", 22, 22)


def test_one_that_fits_a_gpu_lies_there_alone() -> None:
    assert places_of("opt-125m", "sequential", 2, 2)[1] == {"": torch.device("cuda", 0)}


def test_of_nested_names_the_nearest_counts() -> None:
    model = build_meta(line().model)
    found = devices_of_modules(
        model, {"": "cuda:1", "model": "cuda:0", f"{LAYERS}.1": "cuda:1", "lm_head": "cuda:0"}
    )
    assert {name: place.index for name, place in found.items()} == {
        "model.embed_tokens": 0,
        f"{LAYERS}.0": 0,
        f"{LAYERS}.1": 1,
        "model.norm": 0,
        "model.rotary_emb": 0,
        "lm_head": 0,
    }


@pytest.mark.parametrize(
    ("device_map", "said"),
    [
        (
            {"": "cuda:0", "model.layer.1": "cuda:1"},
            "has no such module; did you mean model.layers",
        ),
        ({"model": "cuda:0"}, "says of lm_head.weight nothing"),
        (
            {"": "cuda:0", f"{LAYERS}.1.mlp": "cuda:1"},
            r"splits model.layers.1, a LlamaDecoderLayer, over cuda:0 and cuda:1",
        ),
        (
            {"model": "cuda:0", "lm_head": "cuda:1"},
            r"model.embed_tokens.weight on cuda:0 and lm_head.weight on cuda:1.* one tied weight",
        ),
    ],
)
def test_a_map_that_does_not_fit_the_model(device_map: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        devices_of_modules(build_meta(line().model), device_map)


# ---------------------------------------------------------------------- the numbers of a step


@dataclass
class Done:
    """What some steps have given."""

    records: list[Any]
    weights: dict[str, Tensor]
    scores: list[Tensor]
    devices: set[str]


def work(settings: Any, job: Loaded, prepare: Callable[[Any], None] = lambda model: None) -> Done:
    """Two steps, then the scores of the dev rows."""
    model: Any = job.model
    prepare(model)
    method = build_method(job)
    rows = job.encode(job.task.train[:4], job.prompts[0])
    objective = settings.method.get("objective", "loss")
    records = [method.step(lambda: job.scorer.objective(rows, objective)) for _ in range(2)]
    dev = job.encode(job.task.dev, job.prompts[0])
    if settings.task["kind"] == "generation":
        scores = [torch.tensor(len(text)) for _, of in job.scorer.generate_all(dev) for text in of]
    else:
        with job.scorer.holding(dev):
            scores = [found for _, found in job.scorer.score_all(dev)]
    weights = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    return Done(records, weights, scores, {str(p.device) for p in model.parameters()})


def same(a: Done, b: Done) -> None:
    assert a.records == b.records
    assert a.weights.keys() == b.weights.keys()
    assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)
    assert len(a.scores) == len(b.scores)
    assert all(map(torch.equal, a.scores, b.scores))


EAGER = ["model.attention=eager"]  # sdpa takes other kernels on a device that is not there
# All but one name their executor: to time the others takes as long as the steps.
CASES = {
    "sequential": ["model=tiny-llama", "method=mezo", "method.executor=sequential"],
    "lockstep": ["model=tiny-gemma3", "method=sparse_mezo", "method.executor=lockstep"],
    "in_place": ["model=tiny-opt", "method=sparse_mezo", "method.executor=in_place"],
    "opt": ["model=tiny-opt", "method=sparse_mezo", "sparsity=0.5"],
    "bfloat16": [
        *("model=tiny-mistral", "method=mezo", "dtype=bfloat16", "method.executor=sequential"),
    ],
    "adam": ["model=tiny-llama", "method=mezo_adam", "method.executor=lockstep"],
    "lora": ["model=tiny-llama", "method=mezo_lora", "method.executor=lockstep"],
    "prefix": ["model=tiny-llama", "method=mezo_prefix", "method.executor=sequential"],
    "accuracy": [
        *("model=tiny-llama", "method=mezo", "method.objective=accuracy"),
        "method.executor=lockstep",
    ],
    "masked": [
        *("model=tiny-roberta", "method=mezo", "task.labels={0: terrible, 1: great}"),
        *('task.prompt="{text} It was {mask} ."', "method.executor=lockstep"),
    ],
    "masked prefix": [
        *("model=tiny-roberta", "method=mezo_prefix", "task.labels={0: terrible, 1: great}"),
        *('task.prompt="{text} It was {mask} ."', "method.executor=sequential"),
    ],
}


def parted(model: Any, first: str, second: str) -> dict[str, str]:
    """Embeddings, the first layer and the head here, all else there."""
    names = [name for name, _ in model.named_modules()]
    here = [n for n in names if n.endswith(("embed_tokens", "embeddings", "layers.0", "layer.0"))]
    return {"": second} | dict.fromkeys([*here, "lm_head"], first)


def with_places(
    words: Sequence[str], monkeypatch: pytest.MonkeyPatch, *kinds: str, rows: Sequence[str] = SMALL
) -> Done:
    """A job on devices that do not exist; on one alone where one is given."""
    settings = check(compose([*rows, *words, *EAGER, "+model.device_map=auto"]))
    real = devices_of_modules

    def found(model: Any, device_map: Any) -> dict[str, torch.device]:
        if len(kinds) == 1:
            return {"": torch.device(kinds[0])}
        return real(model, parted(model, *kinds))

    with two_devices(monkeypatch), monkeypatch.context() as patched:
        patched.setattr(placement, "devices_of_modules", found)
        job = Loaded(settings, "cpu", lambda said: None)
        if len(kinds) == 1:
            job.model.tie_weights()  # to(...) makes new tensors of such a kind
        return work(settings, job)


@pytest.mark.parametrize("case", CASES)
def test_layers_on_two_devices_give_the_bits_of_one(
    case: str, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    one = with_places(CASES[case], monkeypatch, "maia:0")
    two = with_places(CASES[case], monkeypatch, "maia:0", "maia:1")
    assert one.devices == {"maia:0"}
    assert two.devices == {"maia:0", "maia:1"}
    same(one, two)


def test_tensors_that_meet_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The devices of the tests above are no mere names."""
    with two_devices(monkeypatch) as (here, there):
        a, b = torch.ones(3, device=here), torch.ones(3, device=there)
        with pytest.raises(RuntimeError, match=r"tensors on \['maia:0', 'maia:1'\]"):
            a + b
        with pytest.raises(RuntimeError, match="maia:0 and another"):
            a[torch.tensor([0, 1], device=there)]
        assert (a + b.to(here)).tolist() == [2, 2, 2]


@pytest.fixture
def two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights on the CPU are on cpu:0, too, and stay: torch copies them, to a tensor on cpu again.

    Accelerate would take the copy, which is no parameter; a copy to the GPU where it is is itself.
    """
    monkeypatch.setattr(hooks, "set_module_tensor_to_device", lambda *args, **kwargs: None)


def spread(model: Any) -> None:
    """Put accelerate's hooks around modules that stay where they are; see `two_names`."""
    layers = [n for n, _ in model.named_modules() if n.endswith("layers.1")]
    places: dict[str, torch.device] = {}
    for name, module in model.named_modules():
        if not list(module.children()) or name.endswith(("layers.0", "layers.1")):
            inside = any(name.startswith(f"{n}.") for n in places)
            cpu = torch.device("cpu", 0) if name in layers else torch.device("cpu")
            places |= {} if inside else {name: cpu}
    dispatch_model(model, places, skip_keys=["past_key_values"])
    assert len(places) > 3
    assert hasattr(model, "_hf_hook")


@pytest.mark.parametrize("hooks_first", [True, False])
@pytest.mark.parametrize("case", ["sequential", "lockstep", "opt", "lora"])
def test_accelerates_hooks_change_no_number(
    case: str, hooks_first: bool, one_thread: None, two_names: None
) -> None:
    """Two names of the CPU, so that there are hooks on the way that a real model takes."""
    settings = check(compose([*SMALL, *CASES[case], "device=cpu"]))
    plain = work(settings, Loaded(settings, "cpu", lambda said: None))
    job = Loaded(settings, "cpu", lambda said: None)
    if hooks_first:
        same(plain, work(settings, job, spread))
        return
    # And around a probe that is there already.
    method = build_method(job)
    rows = job.encode(job.task.train[:4], job.prompts[0])
    spread(job.model)
    records = [method.step(lambda: job.scorer.objective(rows)) for _ in range(2)]
    assert records == plain.records


def test_without_its_prefix_a_model_has_the_forward_that_accelerate_gave_it(
    two_names: None,
) -> None:
    """What brings inputs to the first device and the output back to theirs is in that forward."""
    plain, prefix = (
        check(compose([*SMALL, *CASES[case], "device=cpu"])) for case in ("sequential", "prefix")
    )
    job = Loaded(plain, "cpu", lambda said: None)
    spread(job.model)
    own = job.model.__dict__["forward"]
    adapter = attach(job.model, prefix.method["adapter"], 0)
    wrapped = job.model.__dict__["forward"]
    assert wrapped is not own
    with adapter.off():
        assert job.model.__dict__["forward"] is own
    assert job.model.__dict__["forward"] is wrapped


def test_a_folder_is_spread_as_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None, two_names: None
) -> None:
    base = check(compose([*LINE, "device=cpu"]))
    plain = Loaded(base, "cpu", lambda said: None)
    plain.save(tmp_path / "base")
    asked: list[Any] = []
    real = devices_of_modules

    def found(model: Any, device_map: Any) -> dict[str, torch.device]:
        asked.append({p.device.type for p in model.parameters()})
        names = real(model, parted(model, "cuda:0", "cuda:1"))
        return {
            n: torch.device("cpu", 0) if d.index else torch.device("cpu") for n, d in names.items()
        }

    monkeypatch.setattr(placement, "devices_of_modules", found)
    words = ["model=own", f"model.path={tmp_path / 'base'}", "model.max_length=64"]
    settings = check(compose([*SMALL, "method=mezo", *words, "model.device_map=auto"]))
    said: list[str] = []
    job = Loaded(settings, "cpu", said.append)
    assert asked == [{"meta"}]  # before a weight was read, and never again
    assert job.device_map is not None
    assert job.device_map["model.layers.1"] == "cpu:0"
    assert "weights, on cpu, cpu:0" in said[-1]
    same(work(base, plain), work(settings, job))

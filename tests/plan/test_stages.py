"""`smezo plan`: what it says of a method is what that method does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from smezo_cli.cli import verbs
from smezo_cli.config.build import build
from smezo_cli.config.compose import compose
from smezo_cli.config.settings import Settings, check
from smezo_cli.errors import UserError
from smezo_cli.models.load import load_model
from smezo_cli.models.quantised import freeze_as_codes
from smezo_cli.plan.planner import Plan, plan
from smezo_cli.plan.trace import Keep, PadOnly, trace
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.method import build_method
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.zo.quantised import linear_layers
from smezo_cli.zo.saliency import largest
from smezo_cli.zo.tangent import TangentMover

TINY = ("task=toy", "model=tiny-llama", "steps=20", "eval_every=10", "compile=false")
WEIGHTS = 37_472  # of tiny-llama, its tied embedding once


def settings_of(*words: str) -> Settings:
    return check(compose([*TINY, *words, "device=cpu"]))


def planned(*words: str, tokens: int = 32) -> Plan:
    return plan(settings_of(*words), capacity=10**9, tokens=tokens)


def tiny_model(settings: Settings) -> Any:
    model, _ = load_model(
        settings.model, dtype=torch.float32, device=torch.device("cpu"), cache=Path("unused")
    )
    return model


# --- masks that a run makes once ---------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_weights_beside_a_mask_are_those_of_a_run(bits: int | None) -> None:
    """Held as codes around its entries where that is asked for, with the places of the entries."""
    words = ["method=senszoq", "sparsity=0.9", *([f"method.frozen_bits={bits}"] if bits else [])]
    model = tiny_model(settings_of(*words))
    whole = sum(p.nbytes for p in model.parameters())
    index = largest({n: p.detach().square() for n, p in model.named_parameters()}, 0.9, "tensor")
    around = {f"{name}.weight" for name in linear_layers(model)}
    if bits:
        freeze_as_codes(model, {n: at for n, at in index.items() if n in around}, bits=bits)
    found = planned(*words)
    assert found.resident["weights"] == sum(p.nbytes for p in model.parameters())
    assert found.resident["buffers"] == sum(b.nbytes for b in model.buffers())
    assert found.resident["mask"] == sum(at.nbytes for at in index.values())
    # While the mask is made the weights are whole, each with its score, and a gradient or more.
    held = sum(found.resident.values()) - found.resident["Python and its libraries"]
    assert found.phases["mask"] + held > whole * 2
    plain = planned("method=mezo", "method.keep_noise=false")
    if bits:
        assert found.resident["weights"] < 0.6 * whole
        assert found.disk < 0.5 * plain.disk
    else:
        assert found.resident["weights"] == whole
        # No noise of whole tensors is kept from probe to update.
        assert found.phases["step"] <= plain.phases["step"]


def test_a_mask_of_another_run_is_not_made() -> None:
    made, taken = (planned("method=mazo", *more) for more in ([], ["method.mask_from=there"]))
    assert made.phases["mask"] > 12 * WEIGHTS - made.resident["mask"]
    assert "mask" not in taken.phases
    assert taken.resident == made.resident


# --- noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["mezo", "zo_conservative", "zo_block", "pezo", "lozo", "subzero", "elasticzo"]
)
def test_noise_that_is_kept_is_that_of_a_real_step(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(f"method={method}")
    model = tiny_model(settings)
    real = build(settings.method, "method", model=model, seed=0, backend="eager", check=False)
    dense = getattr(real.direction, "dense", real.direction)
    end, found = dense.end, []

    def ends() -> None:
        found.append(sum(z.nbytes + mask.nbytes for z, mask in dense._kept.values()))
        end()

    monkeypatch.setattr(dense, "end", ends)
    real.step(lambda: model(torch.ones(1, 4, dtype=torch.int64)).logits.square().mean())
    without = planned(f"method={method}", "method.keep_noise=false").phases["step"]
    assert planned(f"method={method}").phases["step"] - without == max(found) > 0


def test_numbers_of_registers_are_kept_and_need_no_compiler() -> None:
    """Those of one pool are read by compiled passes, and none are kept."""
    registers = "method=pezo", "method.generators=3"
    found = planned(*registers, "compile=true")
    assert "Numba" not in found.resident
    assert found.phases["step"] == planned(*registers).phases["step"]
    pool = planned("method=pezo", "compile=true")
    assert "Numba" in pool.resident
    assert found.phases["step"] - pool.phases["step"] == 5 * WEIGHTS


def test_noise_that_a_user_asks_for_is_kept_by_compiled_passes() -> None:
    auto, kept = (
        planned("method=mezo", "compile=true", f"method.keep_noise={wish}").phases["step"]
        for wish in ("auto", "true")
    )
    assert kept - auto == 5 * WEIGHTS


# --- gradients beside probes, and tangents ----------------------------------------------------

TAIL = "backpropagation, gradients included"
ALL = "forward and backward, gradients included"


def test_backpropagation_of_all_weights_is_that_of_sgd_less_its_gradients() -> None:
    """Of as many rows; a gradient is dropped once its tensor has moved."""
    found = planned("method=addax", "method.short_rows=4", "method.keep_noise=false").phases[TAIL]
    whole = planned("method=sgd", "batch_size=4").phases[ALL]
    assert whole - 4 * WEIGHTS < found < whole


def test_over_micro_batches_gradients_add_up() -> None:
    words = ("method=addax", "method.short_rows=4", "method.keep_noise=false")
    found = planned(*words, "micro_batch_size=2").phases[TAIL]
    of_two = planned("method=sgd", "batch_size=2").phases[ALL]
    # Up to the moves of the largest tensor, and a float64 sum.
    assert of_two <= found <= of_two + 4 * 4 * 334 * 32


def test_short_rows_are_as_long_as_short_ones_may_be() -> None:
    short, long, few = (
        planned("method=addax", *words).phases[TAIL]
        for words in (["method.long_above=16"], [], ["method.short_rows=2"])
    )
    assert short < long
    assert few < long


def test_activations_are_kept_for_the_tail_alone() -> None:
    nothing, one, whole = (
        planned(*words, "method.keep_noise=false").phases[TAIL]
        for words in (
            ["method=elasticzo", "method.tail_blocks=0"],
            ["method=elasticzo", "method.tail_blocks=1"],
            ["method=addax", "method.short_rows=16", "batch_size=16"],
        )
    )
    assert nothing < one < whole
    noisy = planned("method=elasticzo").phases[TAIL]
    frozen = sum(p.numel() for p in _tail_of_elasticzo())
    assert noisy - one == 5 * (WEIGHTS - frozen)  # noise of the others is kept meanwhile


def _tail_of_elasticzo() -> list[Any]:
    settings = settings_of("method=elasticzo")
    model = tiny_model(settings)
    method = build(settings.method, "method", model=model, seed=0, check=False)
    return list(method.tail.parameters.values())


@pytest.mark.parametrize("method", ["addax", "elasticzo"])
def test_a_tail_takes_what_it_takes_of_real_tensors(method: str) -> None:
    settings = settings_of(f"method={method}", "method.keep_noise=false")
    model = tiny_model(settings)
    real = build(settings.method, "method", model=model, seed=0, check=False)
    number = 4 if method == "addax" else settings.batch_size
    closure = Rows(model, number)
    found, _ = trace(list(model.parameters()), lambda: real.tail.apply(closure, 1e-9, 0))
    stage = planned(f"method={method}", "method.keep_noise=false").phases[TAIL]
    assert stage == pytest.approx(found, rel=0.02)  # equal rows share what differs on meta


class Rows:
    """The loss of equal rows of 32 tokens."""

    def __init__(self, model: Any, number: int) -> None:
        row = Candidates((tuple(range(32)), (*range(31), 40)), (1, 1), 0, False)
        self._scorer, self._rows = Scorer(model, PadOnly()), [row] * number

    def __call__(self) -> Any:
        return self._scorer.loss(self._rows)

    def of(self, objective: str) -> "Rows":
        return self


def test_tangents_take_what_they_take_of_real_tensors() -> None:
    settings = settings_of("method=forward_grad")
    model = tiny_model(settings)
    real = build(settings.method, "method", model=model, seed=0, backend="eager", check=False)
    closure = Rows(model, settings.batch_size)
    mover = TangentMover(Keep())
    made = []

    def measure() -> None:
        with torch.no_grad():
            made.append(real.executors.derivative(closure, mover))

    found, left = trace(list(model.parameters()), measure, is_fused=False)
    step = planned("method=forward_grad", "method.keep_noise=false").phases["step"]
    # Of real tensors tangents that are zero count, too, which torch holds without memory.
    assert step == pytest.approx(found - left, rel=0.1)
    assert step > 1.5 * planned("method=mezo", "method.executor=sequential").phases["step"]


@pytest.mark.parametrize("method", ["lozo", "subzero", "eggroll", "mezo", "p_rge"])
@pytest.mark.parametrize("executor", ["batched", "side_path"])
def test_points_of_a_batch_take_what_they_take_of_real_tensors(method: str, executor: str) -> None:
    words = (f"method={method}", f"method.executor={executor}", "method.num_queries=2")
    words = (*words, "method.keep_noise=false", "batch_size=4", "compile=true")
    settings = settings_of(*words)
    job = Loaded(settings, "cpu", lambda _: None)
    real = build_method(job)
    closure = Rows(job.model, 4)
    keys = [(query, sign * settings.eps) for query in (0, 1) for sign in (1, -1)]  # type: ignore[operator]  # it is set
    movers = [real.mover([query], [size]) for query, size in keys]

    def measure() -> None:
        with torch.no_grad():
            real.executors.by(real.executors.used, closure, movers)

    measure()  # factors and scratch are there, as in later steps
    held = [*job.model.parameters(), *real._probe._scratch.values()]
    found, left = trace(held, measure)  # the cores that were drawn are left
    kept = real.direction.noise_bytes(compiles=True, on_cpu=True, free=0)
    # Equal rows share what differs on meta.
    assert planned(*words).phases["step"] - kept == pytest.approx(found - left, rel=0.1)


# --- rows of losses ---------------------------------------------------------------------------


def test_a_pass_over_all_rows_is_that_many_rows() -> None:
    words = ("method=mezo_svrg", "method.num_queries=3", "method.anchor_every=5", "batch_size=4")
    found = planned(*words, "task.num_train=100")
    anchors, others = 4 * 6, 16 * 4  # forwards of 20 steps
    assert found.work["forwards of training"] == anchors + others
    assert found.work["rows in them"] == anchors * 100 + others * 4
    assert found.work["tokens in them, at most"] == found.work["rows in them"] * 32
    said = "num_forwards of result.json counts: 64 for the loss batch of 4 rows, 24 for the loss"
    assert any(f"{said} full of 100 rows" in line for line in found.assumptions)
    drawn = planned(*words, "task.num_train=100", "method.full_rows=10").work["rows in them"]
    assert drawn == anchors * 10 + others * 4


@pytest.mark.parametrize("name", ["mezo_svrg", "addax", "bf_ssd"])
def test_rows_are_those_of_real_steps(name: str) -> None:
    words = (f"method={name}", "steps=6", "eval_every=6", "task.num_train=20", "batch_size=6")
    settings = settings_of(*words, "method.executor=sequential")
    model = tiny_model(settings)
    real = build(settings.method, "method", model=model, seed=0, check=False)
    counted = RowsAsked(model, real)
    for step in range(6):
        counted.step = step
        real.step(counted)
    found = planned(*words).work
    assert counted.rows == found["rows in them"]
    assert counted.forwards == found["forwards of training"]


class RowsAsked:
    """A loss that is the same everywhere, and counts the rows that it would be over."""

    def __init__(self, model: Any, method: Any) -> None:
        self._model, self._method = model, method
        self.step = self.rows = self.forwards = 0

    def __call__(self) -> torch.Tensor:
        return self._over(6)

    def _over(self, number: int) -> torch.Tensor:
        self.rows, self.forwards = self.rows + number, self.forwards + 1
        zero: torch.Tensor = self._model(torch.ones(1, 2, dtype=torch.int64)).logits.sum() * 0
        return zero

    def of(self, objective: str) -> Any:
        rows = self._method.rows_of(objective, self.step, range(6), [32] * 20)
        return lambda: self._over(len(rows))


def test_rows_that_the_data_decides_are_left_out() -> None:
    own = ("task=choice", "task.data=my.csv", "task.prompt='{text}'", "task.options=[a,b]")
    found = planned(*own, "method=mezo_svrg")
    assert "rows in them" not in found.work
    assert any("of all train rows (task.num_train is null)" in x for x in found.assumptions)
    assert "rows in them" in planned(*own, "method=mezo").work
    assert (
        "rows in them" in planned(*own, "method=addax").work
    )  # of so many rows, whatever there is


def test_addax_reads_its_own_batches() -> None:
    words = ("method=addax", "method.long_rows=6", "method.short_rows=3", "method.long_above=10")
    work = planned(*words).work
    assert work["forwards of training"] == 20 * 3
    assert work["rows in them"] == 20 * (2 * 6 + 3)
    assert work["tokens in them, at most"] == 20 * (2 * 6 * 32 + 3 * 10)


def test_rows_longer_than_any_are_asked_for_in_vain() -> None:
    with pytest.raises(UserError, match=r"no row of at most 32 tokens .* the loss 'long'"):
        planned("method=addax", "method.long_above=32")


def test_a_loss_of_a_mixture_has_rows_of_all_parts() -> None:
    words = ["task=mixture", "task.parts=[sst2,rte]", "batch_size=6", "compile=false"]
    words += ["model=tiny-llama", "steps=10", "eval_every=10", "method=mezo_svrg", "device=cpu"]
    found = plan(check(compose(words)), capacity=10**9, tokens=32)
    assert found.work["rows in them"] == 5 * 2 * (1000 + 1000) + 5 * 4 * 6
    said = [line for line in found.assumptions if "num_forwards of result.json" in line]
    assert len(said) == 1
    assert "batch of 6 rows" in said[0]
    assert "full of 2000 rows" in said[0]


def test_the_time_is_that_of_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    record = {
        "model": "tiny-llama",
        "dtype": "float32",
        "compute_dtype": "float32",
        "batch_size": 4,
        "length": 32,
        "median_seconds": {"mezo_svrg": 0.25, "forward": 0.05},
        "ratio_to_its_forwards": {"mezo_svrg": 2.0},
    }
    path.write_text(json.dumps(record))
    words = [*TINY, "method=mezo_svrg", "batch_size=4", "--bench", str(path), "--json"]
    assert verbs.main(["plan", *words, "task.num_train=100"]) == 0
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    # 10 anchors of 2 forwards over 100 rows, 10 steps of 4 over 4; 0.1 s a batch of 4.
    assert seconds["steps"] == pytest.approx(0.1 * (10 * 2 * 100 + 10 * 4 * 4) / 4)
    del record["ratio_to_its_forwards"]
    path.write_text(json.dumps(record))
    assert verbs.main(["plan", *words, "task.num_train=100"]) == 2
    assert "does not say what a forward of method mezo_svrg takes" in capsys.readouterr().err

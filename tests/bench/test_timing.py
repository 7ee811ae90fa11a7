"""`smezo bench`: what is timed is what it says, in turns; no claim here is about seconds."""

import gc
import itertools
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from smezo_cli.bench import methods, textbook, timing
from smezo_cli.bench.textbook import Textbook
from smezo_cli.bench.timing import (
    NAMES,
    PASSES,
    UNIT_LORA,
    Bench,
    Thresholds,
    interleave,
    makers,
    rows_of,
    summary,
)
from smezo_cli.cli import bench as line
from smezo_cli.cli.verbs import main
from smezo_cli.config.compose import checked_settings
from smezo_cli.models.load import load_model
from smezo_cli.models.onednn import use_onednn
from smezo_cli.plan.planner import plan
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.zo.step import StepRecord
from tests import CONF
from tests.run.processes import smezo

pytestmark = pytest.mark.usefixtures("one_thread")

FORWARDS = {"forward": 1, "forward_full_logits": 2} | {
    name: 4 for name in NAMES if name.startswith("textbook")
}


def tiny() -> Scorer:
    cfg = OmegaConf.to_container(OmegaConf.load(CONF / "model" / "tiny-llama.yaml"))
    assert isinstance(cfg, dict)
    cpu = torch.device("cpu")
    model, tokenizer = load_model(cfg, dtype=torch.float32, device=cpu, cache=Path("/nowhere"))
    return Scorer(model, tokenizer)


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_no_garbage() -> None:
    """What candidates import and compile: else each of a hundred collections looks at all of it."""
    scorer = tiny()
    methods.beside_lora(scorer, methods.node_of("mezo_lora")["adapter"])
    for name in PASSES:
        makers(scorer, ROWS, Thresholds(scorer.model, 0.75), pass_weights=4001)[name]().step()
    gc.collect()
    gc.freeze()


@pytest.fixture
def scorer() -> Scorer:
    return tiny()


ROWS = rows_of(range(20, 80), (5, 9), batch_size=4, length=12)


# --- rows ------------------------------------------------------------------------------------


def test_rows_are_exactly_as_long_as_asked_and_take_one_forward() -> None:
    assert [len(ids) for row in ROWS for ids in row.full] == [13] * 8
    assert all(row.shares_prefix for row in ROWS)
    assert {row.label for row in ROWS} == {0, 1}
    assert len({row.full[0][:-1] for row in ROWS}) == 4


# --- the textbook ----------------------------------------------------------------------------


def small() -> tuple[nn.Module, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5, generator=generator)
    x = torch.randn(10, 6, generator=generator)
    return model, lambda: model(x).square().mean()


@pytest.mark.parametrize("sparsity", [0.0, 0.75])
def test_a_textbook_step_is_theta_minus_lr_g_m_z(sparsity: float) -> None:
    model, closure = small()
    before = [p.detach().clone() for p in model.parameters()]
    h = textbook.thresholds(model, sparsity) if sparsity else []
    method = Textbook(model, lr=0.1, eps=1e-3, seed=3, thresholds=h)
    record = method.step(closure)
    after = [p.detach().clone() for p in model.parameters()]

    generator = torch.Generator().manual_seed(method.seed_of(0))
    steps = [torch.normal(0.0, 1.0, p.shape, generator=generator) for p in before]
    for z, p in zip(steps, before, strict=True):
        kept = round((1 - sparsity) * p.numel())  # the smallest, chosen by a full sort
        z.view(-1)[p.abs().view(-1).argsort()[kept:]] = 0

    def loss_at(scale: float) -> float:
        with torch.no_grad():
            for p, p0, z in zip(model.parameters(), before, steps, strict=True):
                p.copy_(p0 + scale * z)
            return float(closure())

    # Of losses near 1, apart by 1e-3 g: 6e-8 of each, over 2e-3.
    expected = (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3
    assert record.projected_grad[0] == pytest.approx(expected, abs=3e-4)
    assert record.num_forwards == 2
    for p, p0, z in zip(after, before, steps, strict=True):
        torch.testing.assert_close(p, p0 - 0.1 * record.projected_grad[0] * z, rtol=0, atol=1e-6)
        assert torch.equal(p[z == 0], p0[z == 0])  # the mask leaves the bits


def test_a_textbook_step_without_lr_puts_the_weights_back_and_the_next_draws_anew() -> None:
    model, closure = small()
    before = [p.detach().clone() for p in model.parameters()]
    method = Textbook(model, lr=0.0, eps=1e-3)
    first, second = (method.step(closure).projected_grad[0] for _ in range(2))
    for p, p0 in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), p0, rtol=0, atol=1e-6)
    assert abs(first - second) > 1e-2


def test_textbook_and_scorer_compute_one_loss(scorer: Scorer) -> None:
    with torch.inference_mode():
        # Different forwards of fp32, one with a log-softmax over the vocabulary.
        assert float(textbook.loss(scorer.model, ROWS)) == pytest.approx(
            float(scorer.loss(ROWS)), abs=3e-6
        )


def test_the_textbook_masks_what_pads_short_rows(scorer: Scorer) -> None:
    cut = [replace(row, full=tuple(ids[i:] for ids in row.full)) for i, row in enumerate(ROWS)]
    assert len({row.width for row in cut}) > 1
    with torch.inference_mode():
        assert float(textbook.loss(scorer.model, cut)) == pytest.approx(
            float(scorer.loss(cut)), abs=3e-6
        )


def test_the_textbook_stops_at_a_loss_that_is_not_finite() -> None:
    model, _ = small()
    method = Textbook(model, lr=1.0, eps=1e-3)
    with pytest.raises(ArithmeticError, match="loss nan"):
        method.step(lambda: torch.tensor(math.nan))
    assert all(torch.isfinite(p).all() for p in model.parameters())


# --- candidates ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name not in PASSES])
def test_a_step_makes_the_forwards_that_its_kind_has(scorer: Scorer, name: str) -> None:
    """And, where it is a step, moves all weights by nothing that matters: rounds are alike."""
    made = makers(scorer, ROWS, Thresholds(scorer.model, 0.75))[name]()
    made.step()  # as the warm-up, in which the executor is chosen by a few forwards more
    before = [p.detach().clone() for p in scorer.model.parameters()]
    shapes: list[torch.Size] = []
    hook = scorer.model.register_forward_hook(lambda *args: shapes.append(args[2].logits.shape))
    record = made.step()
    hook.remove()
    expected = FORWARDS.get(name, 2)
    if name in methods.names():
        assert isinstance(record, StepRecord)
        expected = record.num_forwards
    # Where layers are changed it has a model of its own.
    if name in ("quzo", "qzo", UNIT_LORA) or (name in methods.names() and methods.on_lora(name)):
        assert not shapes
        return
    assert len(shapes) == expected
    full = name == "forward_full_logits" or name.startswith("textbook")
    assert set(shapes) == {torch.Size([4, 13, 334] if full else [4, 1, 2])}
    for p, p0 in zip(scorer.model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), p0, rtol=0, atol=2e-6)
        assert p.requires_grad


@pytest.mark.parametrize(
    ("name", "is_ours"),
    [
        ("forward", True),
        ("mezo", True),
        ("forward_full_logits", False),
        ("textbook_sparse_mezo", False),
        ("textbook_sparse_mezo_our_layers", True),
    ],
)
def test_rivals_compute_with_the_linear_layers_of_torch(
    scorer: Scorer, name: str, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda s, x: calls.append("torch") or plain(s, x)
    )

    def plain(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.weight, layer.bias)

    assert use_onednn(scorer.model)
    held = {m: m.__dict__["forward"] for m in scorer.model.modules() if "forward" in m.__dict__}
    makers(scorer, ROWS, Thresholds(scorer.model, 0.75))[name]().step()
    # The label rows alone are computed by whatever the output layer has.
    assert (not calls) == is_ours
    assert held == {m: m.__dict__["forward"] for m in held}


@pytest.mark.parametrize("name", ["mezo", *timing.VARIANTS])
def test_ours_train_every_weight(scorer: Scorer, name: str) -> None:
    method: Any = makers(scorer, ROWS, Thresholds(scorer.model, 0.75))[name]().step.func.__self__  # type: ignore[attr-defined]  # a partial
    assert method.num_weights == sum(p.numel() for p in scorer.model.parameters())
    # Gains are constant and so dense; 0.75 leaves a quarter of the rest.
    assert method.active_share() == pytest.approx(1.0 if name == "mezo" else 0.25, abs=0.01)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_moves_the_small_quarter(scorer: Scorer, name: str) -> None:
    made = makers(scorer, ROWS, Thresholds(scorer.model, 0.75), pass_weights=4001)[name]()
    made.step()
    weight, out, _ = made.step.__wrapped__.args  # type: ignore[attr-defined]  # a decorated partial
    moved = weight != out
    assert int(moved.sum()) == 1000
    assert weight[moved].abs().max() < weight[~moved].abs().min()


# --- rounds ----------------------------------------------------------------------------------


def test_rounds_run_every_candidate_once_in_an_order_that_rotates() -> None:
    ran: list[str] = []
    told: list[str] = []
    steps = {name: lambda name=name: ran.append(name) for name in "abc"}
    waits = itertools.count()
    seconds = interleave(steps, 4, wait=lambda: next(waits), tick=told.append)
    assert "".join(ran) == "abc" + "bca" + "cab" + "abc"
    assert told == ran
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 4)
    assert next(waits) == 2 * len(ran)  # before and after each
    assert gc.isenabled()


def test_an_interrupted_round_is_dropped_and_the_whole_ones_are_kept() -> None:
    def until(told: int) -> dict[str, list[float]]:
        left = itertools.count(1)

        def tick(name: str) -> None:
            if next(left) == told:
                raise KeyboardInterrupt

        return interleave({name: lambda: None for name in "abc"}, 9, tick=tick)

    for told in (7, 8, 9):
        assert {name: len(v) for name, v in until(told).items()} == dict.fromkeys("abc", 2)
    with pytest.raises(KeyboardInterrupt):
        until(3)
    assert gc.isenabled()


def test_the_summary_is_medians_over_two_of_the_forwards() -> None:
    found = summary({"forward": [1.0, 9.0, 2.0], "mezo": [6.0, 5.0, 40.0], "pass_gaussian": [1.0]})
    assert found["median_seconds"] == {"forward": 2.0, "mezo": 6.0, "pass_gaussian": 1.0}
    assert found["iqr_seconds"] == {"forward": 4.0, "mezo": 17.5, "pass_gaussian": 0.0}
    assert found["ratio_to_two_forwards"] == {"forward": 0.5, "mezo": 1.5}
    assert found["rounds"]["mezo"] == [6.0, 5.0, 40.0]


# Of methods those of each kind: that all of them step here is the test of their forwards above.
WEIGHED = tuple(
    name
    for name in NAMES
    if name not in methods.names()
    or name in ("mezo", "sparse_mezo", "mezo_lora", "lozo", "quzo", "hizoo", "fzoo", "elasticzo")
)


def test_every_candidate_is_timed_and_weighed(scorer: Scorer) -> None:
    told: list[str] = []
    bench = Bench(scorer, ROWS, WEIGHED, rounds=1, pass_weights=5000, tick=told.append)
    found = bench.run()
    assert list(found["median_seconds"]) == list(WEIGHED)
    assert {len(rounds) for rounds in found["rounds"].values()} == {1}
    steps = set(WEIGHED) - set(PASSES)
    assert set(found["ratio_to_two_forwards"]) == steps
    assert set(found["weights_per_second"]) == set(PASSES)
    assert set(found["passes"]) == set(WEIGHED) - {"forward", UNIT_LORA, "forward_full_logits"}
    assert found["failed"] == {}
    assert len(told) == bench.num_ticks
    peaks = found["peak_bytes"]
    assert set(peaks) in (steps, set())  # a system without /proc has none
    for name in peaks:
        assert found["peak_over_forward"][name] == peaks[name] / peaks["forward"]
        weights = 4 * sum(p.numel() for p in scorer.model.parameters())
        assert found["peak_above_weights_bytes"][name] == peaks[name] - weights > 0


def test_a_peak_is_that_of_one_step(scorer: Scorer) -> None:
    """What a step takes and gives back counts; what was taken before the step does not."""
    bench = Bench(scorer, ROWS)
    size = 64 * 2**20

    def take() -> None:
        torch.ones(size // 4).sum()

    low = bench._peak(lambda: timing.Candidate(lambda: None))
    if low is None:
        pytest.skip("this system does not let a process reset its peak")
    take()
    again = bench._peak(lambda: timing.Candidate(lambda: None))
    high = bench._peak(lambda: timing.Candidate(take))
    assert again is not None
    assert high is not None
    # The kernel counts pages in lots, and other threads come and go.
    assert abs(again - low) < size / 4
    assert size * 0.75 < high - low < size * 1.25


def test_a_rival_that_does_not_fit_is_named_and_left_out(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Textbook, closure: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Textbook, "step", full)
    found = Bench(scorer, ROWS, ["textbook_mezo", "mezo"], rounds=1).run()
    assert found["failed"] == {"textbook_mezo": "out of memory"}
    assert set(found["median_seconds"]) == set(found["rounds"]) == {"forward", "mezo"}


def test_growth_has_a_record_for_each_size(scorer: Scorer) -> None:
    sizes = {(b, n): rows_of(range(20, 300), (5, 9), b, n) for b in (2, 3) for n in (4, 8)}
    records = Bench(scorer, ROWS, [], rounds=2).grow(sizes)
    assert [(r["batch_size"], r["length"]) for r in records] == list(sizes)
    for record in records:
        assert list(record["median_seconds"]) == ["forward", "mezo", "sparse_mezo"]
        assert record["ratio_to_two_forwards"]["forward"] == 0.5


# --- the command -----------------------------------------------------------------------------


def test_the_command_writes_what_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    words = f"bench model=tiny-llama batch_size=2 length=8 device=cpu --rounds 2 --json {out}"
    assert main([*words.split(), "--only", "mezo,textbook_sparse_mezo"]) == 0
    found = json.loads(out.read_text())
    names = ["forward", "textbook_sparse_mezo", "mezo"]
    assert list(found["median_seconds"]) == names
    assert (found["model"], found["batch_size"], found["length"]) == ("tiny-llama", 2, 8)
    assert (found["dtype"], found["compute_dtype"]) == ("float32", "float32")
    assert found["tokens"] == "random, seed 0"
    assert found["versions"]["threads"] == 1
    assert found["machine"]["cpus"] >= 1
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    assert f"{found['ratio_to_two_forwards']['mezo']:.3f}" in shown
    if found["peak_bytes"]:  # a system without /proc has none
        run = ["model=tiny-llama", "method=mezo", "batch_size=2", "~recipe", "~recipe/model"]
        planned = plan(checked_settings([*run, "device=cpu"], None, lambda _: None), tokens=9)
        assert found["planned_bytes"] == {"mezo": planned.step_peak}
        over = found["peak_bytes"]["mezo"] / (planned.step_peak + found["beside_plan_bytes"])
        assert found["peak_over_plan"] == {"mezo": over}
        far = f"more than 10% from what smezo plan says: mezo {over:.2f}"
        assert (far in shown) == (abs(over - 1) > 0.1)


@pytest.mark.parametrize(("told", "rounds"), [(9, [2]), (20, [5]), (40, [5, 1])])
def test_ctrl_c_leaves_what_was_measured(
    told: int,
    rounds: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the third round of 5, with two candidates and the unit; and in the second table."""
    left = itertools.count(1)

    def interrupted(*given: Any, tick: Callable[[str], object], **named: Any) -> Any:
        def counted(name: str) -> None:
            tick(name)
            if next(left) == told:
                raise KeyboardInterrupt

        return interleave(*given, tick=counted, **named)

    monkeypatch.setattr(timing, "interleave", interrupted)
    out = tmp_path / "bench.json"
    words = f"bench model=tiny-llama batch_size=2 length=8 device=cpu --rounds 5 --json {out}"
    grow = ["--grow"] if told > 15 else []
    assert main([*words.split(), "--only", "mezo,fzoo", *grow]) == 130
    found = json.loads(out.read_text())
    assert found["interrupted"]
    tables = [found, *found.get("grow", [])[:1]]
    assert [{len(each) for each in table["rounds"].values()} for table in tables] == [
        {number} for number in rounds
    ]
    assert set(found["ratio_to_its_forwards"]) == {"mezo", "fzoo"}
    places = zip(rounds, ("the first table", "the second"), strict=False)
    text = ", ".join(f"{number} rounds in {table}" for number, table in places)
    assert f"interrupted: {text}" in capsys.readouterr().out


def as_command(words: list[str]) -> int:
    """What `smezo` does with its command line, Ctrl-C and all."""
    sys.argv[1:] = words
    return main()


def ctrl_c_in_the_second_round() -> None:
    """Send this process a SIGINT once so many steps were timed."""
    left, real = itertools.count(1), timing.interleave

    def interrupted(*given: Any, tick: Callable[[str], object], **named: Any) -> Any:
        def counted(name: str) -> None:
            if next(left) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            tick(name)

        return real(*given, tick=counted, **named)

    timing.interleave = interrupted  # in a child process of its own


def test_a_ctrl_c_of_the_terminal_does_so_too(tmp_path: Path) -> None:
    words = "bench model=tiny-llama batch_size=2 length=8 device=cpu --only forward --rounds 99"
    given = [*words.split(), "--json", "bench.json"]
    ended = smezo(given, tmp_path, program=as_command, faults=[ctrl_c_in_the_second_round])
    assert (ended.code, ended.err) == (130, "")
    found = json.loads((tmp_path / "bench.json").read_text())
    assert len(found["rounds"]["forward"]) == 2


def test_low_precision_is_measured_too(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    words = f"bench model=tiny-llama batch_size=2 length=8 device=cpu --rounds 1 --json {out}"
    words += " dtype=float32 compute_dtype=bfloat16 --only mezo,textbook_mezo"
    assert main(words.split()) == 0
    assert json.loads(out.read_text())["compute_dtype"] == "bfloat16"


def test_help_names_every_candidate_and_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    named = [name for name in NAMES if name not in methods.names()]  # smezo ls methods has them
    assert all(name in out for name in (*named, *line.KEYS, "lezo", "lozo"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("lenght=3", "takes no lenght, did you mean length?"),
        ("lr=3", "takes no lr (there are: batch_size"),
        ("length=0", "length=0: length must be a whole number"),
        ("length=x", "length=x: length must be a whole number"),
        ("model=tiny-llama length=256", "model.max_length=256; lower length"),
        ("model=tiny-llama model.max_length=100 --grow", "length=128 leaves no room"),
        ("batch_size=0", "batch_size must be a whole number"),
        ("batch_size=8,16", "names several values"),
        ("length", "length is not of the form KEY=VALUE"),
        ("model=tiny-roberta", "is masked"),
        ("dtype=bf16", "dtype must be float32"),
        ("--rounds 0", "--rounds 0: must be at least 1"),
        ("--rounds x", "--rounds: invalid int value"),
        ("--only mzo", "--only mzo: there is no such candidate, did you mean"),
        ("--json /no/where.json", "there is no folder /no"),
        ("--json /", "is a folder"),
        ("--json /dev/null", "--json /dev/null is no ordinary file"),
        ("--grw", "unrecognized arguments: --grw; smezo bench --help"),
    ],
)
def test_mistake_is_one_sentence_and_exit_code_2(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured_by_its_own_allocator(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    words = f"bench model=tiny-llama batch_size=2 length=8 device=cuda --rounds 1 --json {out}"
    assert main([*words.split(), "--only", "mezo,sparse_mezo,textbook_mezo"]) == 0
    found = json.loads(out.read_text())
    assert found["machine"]["accelerator"]
    assert 4 * found["num_weights"] < found["peak_bytes"]["forward"] < 2**28


@pytest.mark.parametrize("name", ["lozo@side_path", "lozo@batched", "p_rge@sequential"])
def test_a_method_is_timed_with_the_executor_that_is_asked_for(scorer: Scorer, name: str) -> None:
    found = Bench(scorer, ROWS, [name], rounds=1).run()
    wanted = {"forward", name} | ({UNIT_LORA} if name.startswith("p_rge") else set())
    assert set(found["median_seconds"]) == wanted
    assert found["ratio_to_its_forwards"][name] > 0


def test_a_copy_with_lora_shares_the_weights_and_leaves_them_trained(scorer: Scorer) -> None:
    own = methods.beside_lora(scorer, methods.node_of("p_rge")["adapter"])
    places = {p.data_ptr() for p in scorer.model.parameters()}
    shared = [p for n, p in own.model.named_parameters() if ".lora_" not in n]
    assert {p.data_ptr() for p in shared} == places
    assert not any(p.requires_grad for p in shared)
    assert all(p.requires_grad for p in scorer.model.parameters())

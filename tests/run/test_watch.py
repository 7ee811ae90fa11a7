"""The watchdogs and the numerics report: what is planted is found, a resumed run decides alike."""

import dataclasses
import json
import math
import os
import shutil
import signal
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from smezo_cli.cli.verbs import main
from smezo_cli.models.load import load_model
from smezo_cli.run import evaluate as evaluate_module
from smezo_cli.run.numerics import Numerics, loss_noise
from smezo_cli.run.watch import ENOUGH, HISTORY, Watch, report_lines, spike_report
from smezo_cli.scoring.candidates import Candidates, encode
from smezo_cli.scoring.float32 import in_float32
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.tasks import load_task
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.step import Closure, StepRecord
from tests import CONF
from tests.zo.test_optimizer import bits, same, sparse, watched, weights_of

TWINS = [f"tiny-{name}" for name in ("llama", "opt", "gemma3", "qwen2", "mistral", "roberta")]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """All of these models are tiny."""


# ------------------------------------------------------------------------------------- the clip


@pytest.mark.parametrize("queries", [1, 3])
def test_a_clip_cuts_the_update_and_leaves_the_record_as_measured(queries: int) -> None:
    """The move is that of coefficients cut by hand; what was measured is what is recorded."""
    free, clipped, by_hand = (
        sparse(watched(), lr=1e-3, num_queries=queries, clip_projected_grad=c)
        for c in (None, 2.0, None)
    )
    models = [opt.targets[0].parameter for opt in (free, clipped, by_hand)]
    record = free.step(closure_like(free))
    got = clipped.step(closure_like(clipped))
    assert got.projected_grad == record.projected_grad
    assert max(map(abs, got.projected_grad)) > 2.0
    assert got.clipped == sum(abs(g) > 2.0 for g in got.projected_grad)
    assert record.clipped == 0
    cut = [math.copysign(min(abs(g), 2.0), g) for g in got.projected_grad]
    terms = [Term(Key(0, q), -1e-3 * g / queries) for q, g in enumerate(cut)]
    by_hand.direction.apply(0, Move(tuple(terms)))
    assert torch.equal(bits(models[1]), bits(models[2]))
    assert not torch.equal(bits(models[1]), bits(models[0]))


def closure_like(opt: ZeroOrder) -> Closure:
    """The loss of :func:`test_zo.watched` at the optimizer's one tensor."""
    return next(module for module, _ in opt._probe.owners)


def test_a_clip_that_is_never_reached_changes_no_bit() -> None:
    a, b = watched(), watched()
    records = [
        [opt.step(model) for _ in range(4)]
        for model, opt in ((a, sparse(a)), (b, sparse(b, clip_projected_grad=1e6)))
    ]
    assert records[0] == records[1]
    assert torch.equal(bits(a.w), bits(b.w))


# -------------------------------------------------------------------------- spikes and early stop


class Still:
    """A method whose weights nobody looks at."""

    def __init__(self) -> None:
        self.trained = {"w": nn.Parameter(torch.zeros(3))}


def watch_of(notes: dict[str, Any], **options: Any) -> Watch:
    method: Any = Still()
    return Watch(notes, Numerics(method, 0, notes), **options)


def feed(watch: Watch, values: Sequence[float], first: int = 1) -> list[str]:
    return [
        watch.after_step(step, StepRecord(0.5, (g,), 2)) for step, g in enumerate(values, first)
    ]


def test_planted_spikes_are_found_counted_and_named() -> None:
    """Every planted one, no other, not before the scale is known; the first is said, once."""
    values = torch.randn(300, generator=torch.Generator().manual_seed(0)).tolist()
    for step, factor in ((5, 1e3), (40, -30.0), (150, 200.0), (290, 25.0)):
        values[step - 1] = factor
    # |z| is 0.67 in the median and below 4 here: 10 medians are nowhere near.
    notes: dict[str, Any] = {}
    said = feed(watch_of(notes), values)
    assert [step for step, line in enumerate(said, 1) if line] == [40]
    assert "step     40" in said[39]
    report = spike_report(notes)
    assert report is not None
    assert (report["spikes"], report["projected_grads"]) == (3, 300)
    assert (report["largest_spike"]["step"], report["largest_spike"]["value"]) == (150, 200.0)
    median = torch.tensor(values[149 - HISTORY : 149]).double().abs().quantile(0.5).item()
    assert report["largest_spike"]["times_median"] == pytest.approx(200 / median, rel=1e-6)
    rms = math.sqrt(sum(g * g for g in values) / 300)
    assert report["projected_grad_rms"] == pytest.approx(rms, rel=1e-12)
    (line,) = (line for line in report_lines({}, report) if "spikes" in line)
    assert "3 projected" in line
    assert "step 150" in line


def test_a_scale_of_zero_makes_no_spikes() -> None:
    """In low precision the losses of most pairs are equal."""
    notes: dict[str, Any] = {}
    feed(watch_of(notes), [0.0] * ENOUGH * 2 + [1.0])
    assert spike_report(notes) == {
        **{"projected_grads": 2 * ENOUGH + 1, "projected_grad_rms": math.sqrt(1 / 41)},
        **{"clipped": 0, "spikes": 0, "largest_spike": None, "unmoved": 2 * ENOUGH},
    }


LOOKS = [2.0, 1.9, 1.95, 1.8, 1.9, 2.0, 2.1, 9.0]


@pytest.mark.parametrize(
    ("options", "ends_at", "says"),
    [
        ({"patience": 3}, 7, ["3 evaluations", "patience=3"]),
        ({"patience": 4}, 8, ["patience=4"]),
        ({"patience": 5}, None, []),
        ({"stop_if_diverged": 4.0, "reference": 2.2}, 8, ["dev loss, 9,", "4 times", "2.2"]),
        ({"stop_if_diverged": 5.0, "reference": 2.2}, None, []),
        ({"stop_if_diverged": 5.0, "reference": 2.2, "train": (6, 12.0)}, 6, ["train loss", "12"]),
        ({}, None, []),
    ],
)
@pytest.mark.parametrize("stopped_after", [None, 3, 5])
def test_a_run_ends_at_the_look_that_says_so_also_when_it_was_resumed(
    options: dict[str, Any], ends_at: int | None, says: list[str], stopped_after: int | None
) -> None:
    """The notes go through JSON in the middle of the steps between two looks."""
    options = dict(options)
    where, loss = options.pop("train", (0, 0.0))
    notes: dict[str, Any] = {}
    watch, lowest, found = watch_of(notes, **options), math.inf, None
    for number, dev in enumerate(LOOKS, 1):
        for half in range(2):
            watch.after_step(number, StepRecord(loss if number == where else 2.0, (1.0,), 2))
            if half == 0 and number == stopped_after:
                notes = json.loads(json.dumps(notes))
                watch = watch_of(notes, **options)
        watch.after_evaluation(dev, dev < lowest)
        lowest = min(lowest, dev)
        if watch.why is not None:
            found = number
            break
    assert found == ends_at
    assert all(word in (watch.why or "") for word in says)
    again = watch_of(json.loads(json.dumps(notes)), **options)
    assert again.why == watch.why


# --------------------------------------------------------------------------------- whole runs

TOY = [
    *("train", "task=toy", "task.num_train=16", "task.num_dev=8", "task.num_test=8", "device=cpu"),
    *("model=tiny-opt", "method=mezo", "method.executor=sequential", "batch_size=4"),
]
DIVERGES = [*TOY, "lr=0.01", "steps=40", "eval_every=4", "stop_if_diverged=3", "patience=7"]
CLOCKS = {"sha256", "started", "ended", "train_seconds", "peak_memory_bytes", "command"}


def run_of(words: Sequence[str], cwd: Path, code: int = 0) -> Path:
    here = Path.cwd()
    cwd.mkdir(exist_ok=True)
    os.chdir(cwd)
    try:
        assert main(list(words)) == code
    finally:
        os.chdir(here)
    (found,) = (cwd / "runs/default").iterdir()
    return found


def result_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return {key: value for key, value in loaded.items() if key not in CLOCKS}


def records_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return run_of(DIVERGES, tmp_path_factory.mktemp("diverged"))


def test_a_diverging_run_ends_early_and_is_done(
    diverged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the first look beyond the rule, with the best weights tested; the next start skips it."""
    result, looks = result_of(diverged), [r for r in records_of(diverged) if "dev.loss" in r]
    notes = json.loads((diverged / "checkpoint/state.json").read_text())["notes"]
    losses = [r["loss"] for r in records_of(diverged) if "loss" in r]
    limit = 3 * notes["dev_loss_before"]
    means = [sum(losses[i : i + 4]) / 4 for i in range(0, len(losses), 4)]
    beyond = [r["dev.loss"] > limit or m > limit for r, m in zip(looks, means, strict=True)]
    assert beyond == [False] * (len(beyond) - 1) + [True]
    assert 4 < result["step"] < 40
    assert result["status"] == "done"
    assert result["stopped_early"]["step"] == result["step"] == looks[-1]["step"]
    assert "stop_if_diverged=3" in result["stopped_early"]["why"]
    best = min(looks, key=lambda r: r["dev.loss"])
    assert result["dev"]["best"]["step"] == best["step"] < result["step"]
    assert result["test"]["n"] == 8
    assert result["numerics"].keys() == {"moved_share", "rms_move", "underflow", "sampled"}
    assert result["numerics"]["moved_share"] == looks[-1]["moved_share"] > 0.99
    log = (diverged / "console.log").read_text()
    assert f"ended early at step {result['step']}: the " in log
    capsys.readouterr()
    before = (diverged / "result.json").read_bytes()
    assert run_of(DIVERGES, diverged.parents[2]) == diverged
    assert capsys.readouterr().out.count("\n") == 1
    assert (diverged / "result.json").read_bytes() == before


def test_a_run_stopped_in_the_middle_ends_early_at_the_same_step(
    diverged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between looks and in one: the same bits and the same reports."""
    real = Scorer.loss
    for after in (3, 6):
        count: list[int] = []

        def loss(*words: Any, at: int = after, count: list[int] = count) -> Tensor:
            if len(words[1]) == 4:  # the self-check takes two rows
                count.append(1)
            if len(count) == 2 * at:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*words)

        monkeypatch.setattr(Scorer, "loss", loss)
        run_of(DIVERGES, tmp_path, 130)
    monkeypatch.setattr(Scorer, "loss", real)
    evaluate = evaluate_module.evaluate

    def interrupted(*words: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*words)

    monkeypatch.setattr(evaluate_module, "evaluate", interrupted)
    run_of(DIVERGES, tmp_path, 130)
    monkeypatch.setattr(evaluate_module, "evaluate", evaluate)
    folder = run_of(DIVERGES, tmp_path)
    assert folder.name == diverged.name
    assert result_of(folder) == result_of(diverged)
    assert records_of(folder) == records_of(diverged)


def test_a_longer_run_than_one_that_ended_early_ends_there_too(
    diverged: Path, tmp_path: Path
) -> None:
    """More steps are another wish, and the same answer."""
    shutil.copytree(diverged.parents[2], tmp_path, dirs_exist_ok=True)
    longer = result_of(run_of([*DIVERGES, "steps=60"], tmp_path))
    assert longer["stopped_early"] == result_of(diverged)["stopped_early"]
    assert longer["test"] == result_of(diverged)["test"]


def test_first_order_methods_can_run_out_of_patience(tmp_path: Path) -> None:
    """At so large a step the dev loss is never as low again; there are no spikes to report."""
    words = [w for w in TOY if not w.startswith("method")]
    more = ["method=adamw", "lr=0.03", "steps=24", "eval_every=2", "patience=3"]
    folder = run_of([*words, *more], tmp_path)
    result, looks = result_of(folder), [r for r in records_of(folder) if "dev.loss" in r]
    losses = [r["dev.loss"] for r in looks]
    ends = [i for i in range(3, len(losses)) if min(losses[i - 2 : i + 1]) >= min(losses[: i - 2])]
    assert result["stopped_early"]["step"] == looks[ends[0]]["step"] < 24
    assert result["watch"] is None
    assert "underflow" not in result["numerics"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["patience=9", "eval_every=4"], ["patience=9", "10 evaluations", "eval_every"]),
        (["patience=0"], ["patience=0", "at least 1", "or null", "patience=5"]),
        (["stop_if_diverged=1"], ["stop_if_diverged=1", "above 1", "or null"]),
        (["method.clip_projected_grad=0"], ["method.clip_projected_grad=0", "above 0", "or null"]),
    ],
)
def test_what_could_never_stop_or_clip_is_refused(
    words: list[str], says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TOY, "steps=40", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(word in said for word in says), said


def test_runs_in_low_precision_say_what_it_does_to_their_losses(tmp_path: Path) -> None:
    """Weights or products below float32; forwards, passes and peak stay those of training."""
    for name, more in {
        "plain": [],
        "low": ["dtype=bfloat16"],
        "products": ["compute_dtype=bfloat16"],
    }.items():
        folder = run_of([*TOY, "lr=1e-7", "steps=3", "eval_every=3", *more], tmp_path / name)
        result = result_of(folder)
        assert result["num_forwards"] == 6
        log = (folder / "console.log").read_text()
        assert "weights moved" in log
        assert ("loss noise" in log) == (name != "plain")
        assert ("loss_noise" in result["numerics"]) == (name != "plain")
        if name == "plain":
            # Updates of 1e-7 are eight or more units in the last place of most weights here.
            assert result["numerics"]["underflow"] < 0.05
            continue
        n = result["numerics"]
        assert n["noise_forwards"] == 8
        # bfloat16 keeps 8 bits: losses of size 1 are some 1e-3 off, and not by nothing.
        assert 1e-5 < n["loss_noise"] < 0.1
        eps = 1e-3
        assert n["projected_grad_noise"] == pytest.approx(n["loss_noise"] / (math.sqrt(2) * eps))
        if name == "low":
            assert n["underflow"] > 0.9


# ----------------------------------------------------------------------------------- numerics


class Big(nn.Module):
    """A tensor larger than a sample and one that is not."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.a = nn.Parameter(torch.randn(300, 100, generator=g).to(dtype))
        self.b = nn.Parameter(torch.randn(50, generator=g).to(dtype))

    def forward(self) -> Tensor:
        return self.a.double().square().mean() + self.b.double().sin().sum()


def test_moves_are_those_of_all_weights_within_the_error_of_a_sample() -> None:
    """4,096 draws of a share of 0.3: five standard errors are 0.036; the small tensor is exact."""
    model, notes = Big(), dict[str, Any]()
    opt = sparse(model)
    numerics = Numerics(opt, 0, notes)
    assert numerics.measure() == {"moved_share": 0.0, "rms_move": 0.0}
    with torch.no_grad():
        model.b[:20] += 0.5
    small = numerics.measure()
    assert small["moved_share"] == pytest.approx(20 / 30050, rel=1e-12)
    assert small["rms_move"] == pytest.approx(math.sqrt(20 * 0.25 / 30050), rel=1e-6)
    with torch.no_grad():
        model.a.view(-1)[torch.rand(30000, generator=torch.Generator().manual_seed(2)) < 0.3] += 2.0
    both = numerics.measure()
    assert both["moved_share"] == pytest.approx(0.3, abs=0.036)
    assert both["rms_move"] == pytest.approx(2 * math.sqrt(0.3), rel=0.06)
    assert notes["numerics"]["sampled"] == 4096 + 50
    # The sample depends on the seed and the name alone.
    again = [Numerics(sparse(Big()), seed, {})._samples[0].index for seed in (0, 0, 1)]
    assert again[0] is not None
    assert again[1] is not None
    assert again[2] is not None
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])


MASKS: dict[str, dict[str, Any]] = {
    "none": {"mask": "none", "sparsity": 0.0},
    "small": {"mask": "small"},
    "small, renewed": {"mask": "small", "mask_refresh_every": 2},
    "large": {"mask": "large"},
    "random": {"mask": "random"},
    "random, resampled": {"mask": "random", "mask_resample": "step"},
    "a dense tensor": {"mask": "random", "dense": ["b"]},
}


@pytest.mark.parametrize("mask", MASKS)
def test_the_mask_at_some_entries_is_that_of_the_whole_pass(mask: str) -> None:
    """At every step, asked after it with the entries of before."""
    model = Big()
    opt = sparse(model, lr=0.02, eps=1e-2, **MASKS[mask])
    for step in range(4):
        before = {t.name: t.flat.clone() for t in opt.targets}
        opt.step(model)
        for target in opt.targets:
            index = torch.arange(len(target.flat)).flip(0)[::3]
            found = opt.mask_at(target.parameter, before[target.name][index], index, step)
            moved = (target.flat != before[target.name])[index]
            # A weight may stay where it is by chance, none moves without the mask.
            assert not (moved & ~found).any()
            assert (moved == found).double().mean() > 0.995


@pytest.mark.parametrize(
    ("dtype", "lr", "low", "high"),
    [(torch.float32, 1e-3, 0.0, 0.01), (torch.bfloat16, 1e-7, 0.9, 1.0)],
)
@pytest.mark.parametrize("mask", ["none", "small", "random, resampled"])
def test_underflow_is_the_share_of_the_active_that_the_update_left(
    mask: str, dtype: torch.dtype, lr: float, low: float, high: float
) -> None:
    """Nearly 0 in float32, nearly 1 in bfloat16; exact by hand where the sample is all."""
    model = Big(dtype)
    opt = sparse(model, lr=lr, freeze=["a"], **MASKS[mask])
    notes: dict[str, Any] = {}
    numerics = Numerics(opt, 0, notes)
    numerics.before_step(False)
    numerics.after_step(opt.step(model))
    assert "underflow" not in numerics.measure()
    before = model.b.detach().clone()
    numerics.before_step(True)
    numerics.after_step(opt.step(model))
    found = numerics.measure()["underflow"]
    assert low <= found <= high
    active = opt.mask_at(model.b, before, torch.arange(50), 1)
    lost = active & (model.b.detach() == before)
    assert found == pytest.approx(int(lost.sum()) / int(active.sum()), rel=1e-12)


def test_an_update_of_nothing_has_no_underflow() -> None:
    """Two equal losses: the coefficient is 0."""
    model, notes = Big(), dict[str, Any]()
    opt = sparse(model)
    numerics = Numerics(opt, 0, notes)
    numerics.before_step(True)
    numerics.after_step(opt.step(lambda: torch.ones(())))
    assert "underflow" not in numerics.measure()


# ------------------------------------------------------------------------------- in_float32


def twin(name: str, dtype: torch.dtype) -> tuple[Any, Any, list[Candidates]]:
    cfg: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"model/{name}.yaml"))
    net: Any
    net, tokenizer = load_model(
        cfg, dtype=dtype, device=torch.device("cpu"), cache=Path("/nowhere")
    )
    task_cfg: Any = OmegaConf.to_container(OmegaConf.load(CONF / "task/toy.yaml"))
    task = load_task(task_cfg, data_seed=0, cache=Path("/nowhere"))
    prompt = task.prompts[0]
    if name == "tiny-roberta":
        prompt = dataclasses.replace(prompt, template="{text} It was {mask} .")
    return net.eval(), tokenizer, list(encode(task.train[:6], prompt, tokenizer, 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TWINS)
def test_in_float32_is_a_float_copy_of_the_model(name: str, dtype: torch.dtype) -> None:
    """Logits, hidden states and losses, and afterwards nothing is left of it."""
    net, tokenizer, rows = twin(name, dtype)
    copy = deepcopy(net).float()
    ids = torch.randint(5, 200, (3, 11), generator=torch.Generator().manual_seed(0))
    before, low = weights_of(net), net(input_ids=ids).logits
    with torch.no_grad():
        with in_float32(net):
            ours = net(input_ids=ids, output_hidden_states=True)
            loss = Scorer(net, tokenizer).loss(rows)
        theirs = copy(input_ids=ids, output_hidden_states=True)
        wanted = Scorer(copy, tokenizer).loss(rows)
    assert ours.logits.dtype == torch.float32
    # The same operations in the same order: not one bit differs.
    assert torch.equal(ours.logits, theirs.logits)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(loss, wanted)
    assert not torch.equal(low.float(), ours.logits)
    assert torch.equal(net(input_ids=ids).logits, low)
    assert same(weights_of(net), before)


@pytest.mark.parametrize("frozen", [[], ["*embed*", "*layer*0*"]])
@pytest.mark.parametrize("name", TWINS)
def test_a_probe_in_float32_is_the_float_copy_of_the_moved_weights(
    name: str, frozen: list[str]
) -> None:
    """Embeddings by row, tied heads, label rows: the moved weights are stored in bfloat16 first."""
    net, tokenizer, rows = twin(name, torch.bfloat16)
    opt = sparse(net, eps=1e-2, freeze=frozen)
    scorer = Scorer(net, tokenizer)
    with in_float32(net):
        found = opt.losses_at(lambda: scorer.loss(rows), 1)
    wanted = []
    for sign in (1, -1):
        copy = deepcopy(net)
        named = dict(copy.named_parameters())
        direction = opt.mover([1], [sign * 1e-2])
        for target in opt.targets:
            out = torch.empty_like(target.flat)
            direction.whole(target.parameter, out)
            named[target.name].data.view(-1).copy_(out)
        with torch.no_grad():
            wanted.append(float(Scorer(copy.float(), tokenizer).loss(rows)))
    assert list(found) == wanted
    assert found[0] != found[1]


@pytest.mark.parametrize("options", [{}, {"keep_noise": True}, {"executor": "lockstep"}], ids=str)
def test_measuring_the_loss_noise_changes_nothing(options: dict[str, Any]) -> None:
    """Weights stay, the next step has the same bits, and the error is that of the losses."""
    (net, tokenizer, rows), (other, _, _) = (twin("tiny-llama", torch.bfloat16) for _ in range(2))
    a, b = sparse(net, lr=0.1, eps=1e-2, **options), sparse(other, lr=0.1, eps=1e-2, **options)
    scorer, before = Scorer(net, tokenizer), weights_of(net)
    found = loss_noise(a, scorer, rows)
    assert same(weights_of(net), before)
    theirs = Scorer(other, tokenizer)
    steps = [a.step(lambda: scorer.loss(rows)), b.step(lambda: theirs.loss(rows))]
    assert steps[0] == steps[1]
    assert same(weights_of(net), weights_of(other))
    fresh, _, _ = twin("tiny-llama", torch.bfloat16)
    low = sparse(fresh, eps=1e-2)
    errors = []
    for query in (0, 1):
        run = low.losses_at(lambda: Scorer(fresh, tokenizer).loss(rows), query)
        with in_float32(fresh):
            exact = low.losses_at(lambda: Scorer(fresh, tokenizer).loss(rows), query)
        errors += [x - y for x, y in zip(run, exact, strict=True)]
    t = torch.tensor(errors, dtype=torch.float64)
    assert found["loss_error_rms"] == pytest.approx(t.square().mean().sqrt().item(), rel=1e-9)
    assert found["loss_noise"] == pytest.approx(t.std().item(), rel=1e-9)


def test_a_loss_in_float32_has_no_noise() -> None:
    net, tokenizer, rows = twin("tiny-opt", torch.float32)
    found = loss_noise(sparse(net), Scorer(net, tokenizer), rows)
    assert found["loss_error_rms"] == found["projected_grad_noise"] == 0.0


def test_a_run_whose_noise_cannot_be_measured_keeps_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the measurement: a line says so."""

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory\nmore")

    monkeypatch.setattr("smezo_cli.run.numerics.loss_noise", fails)
    folder = run_of([*TOY, "lr=1e-3", "steps=2", "eval_every=2", "dtype=bfloat16"], tmp_path)
    assert result_of(folder)["status"] == "done"
    assert "not measured: out of memory\n" in (folder / "console.log").read_text()

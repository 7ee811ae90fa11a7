"""What every method of conf/method/ promises. A new one is tested by being there."""

import copy
import functools
import itertools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from smezo_cli.cli.verbs import main
from smezo_cli.config.build import build, target_of
from smezo_cli.config.compose import compose
from smezo_cli.config.fixed import plain
from smezo_cli.config.method_keys import describe, shared_by, trait
from smezo_cli.plan import losses
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.step import NonFiniteLoss
from tests import CONF
from tests.zo.test_optimizer import bits, mlp, same, seeded, weights_of
from tests.zo.test_optimizer import closure_of as squares_of

pytestmark = pytest.mark.usefixtures("one_thread")

# What settings of a method have besides arguments of its class.
_BESIDE = {"name", "_target_", "adapter", "objective"}
_TINY = (
    "model=tiny-llama task=toy task.num_train=8 task.num_dev=4 task.num_test=4 device=cpu "
    "task.prompt=0"
)

NAMES = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))


@functools.cache
def node_of(name: str) -> dict[str, Any]:
    words = [f"method={name}", "model=tiny-llama", "task=toy", "device=cpu"]
    return dict(plain(compose(words))["method"])


@functools.cache
def _file_of(name: str) -> Any:
    return OmegaConf.load(CONF / "method" / f"{name}.yaml")


def _can(name: str, what: str) -> bool:
    """What the class of a method says; read from its file, as every worker collects all tests."""
    node = _file_of(name)
    if "_target_" not in node.get("method", node):
        return _can(node.defaults[0], what)
    return bool(trait(node.get("method", node), what, default=False))


ZEROTH_ORDER = [name for name in NAMES if _can(name, "compares_losses")]
REPLAYING = [name for name in ZEROTH_ORDER if _can(name, "replays")]
SHARING = [name for name in ZEROTH_ORDER if _can(name, "shares_steps")]


def arguments_of(name: str, **values: Any) -> dict[str, Any]:
    """A method's node with its own YAML's values, but step sizes for a small network."""
    node = {key: value for key, value in node_of(name).items() if key not in ("adapter", "seed")}
    node |= {"lr": 1e-2, "eps": 1e-3, "executor": "sequential"}
    node |= {"sparsity": 0.5, "mask_refresh_every": 2} if "mask" in node else {}
    node |= {"num_queries": 3} if node.get("num_queries", 1) > 3 else {}  # more take longer alone
    node |= {"num_rows": 1} if "num_rows" in node else {}  # of a loss that is of no rows
    node |= {"project": ["*"], "project_every": 2} if "project" in node else {}
    node |= {"others": "trained"} if "others" in node else {}  # nothing here is held as codes
    node |= {key: value for key, value in values.items() if key in describe(node).keys}  # type: ignore[union-attr]  # one of ours
    return node


def made(name: str, model: nn.Module, **values: Any) -> ZeroOrder:
    """The method with these arguments."""
    node = arguments_of(name, **values)
    found: ZeroOrder = build(node, model=model, seed=0, backend="eager", check=False)
    return found


class Losses:
    """A closure that stands for every objective of a method, which is the same loss here."""

    def __init__(self, loss: Callable[[], Tensor]) -> None:
        self._loss = loss

    def __call__(self) -> Tensor:
        return self._loss()

    def of(self, objective: str) -> Callable[[], Tensor]:
        return self._loss


def closure_of(model: nn.Module) -> Losses:
    return Losses(squares_of(model))


def state_of(opt: ZeroOrder) -> dict[str, Tensor]:
    return {name: bits(tensor) for name, tensor in opt.snapshot()[1].items()}


@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_a_step_size_or_a_radius_that_cannot_be_is_named(name: str) -> None:
    """Also where a method computes with it before its parts are put together."""
    node = arguments_of(name)
    kind, keys = target_of(node, "method"), describe(node).keys  # type: ignore[union-attr]  # one of ours
    given = {key: value for key, value in node.items() if key in keys}
    for key in ("lr", "eps"):
        with pytest.raises(TypeError, match=rf"^{kind.__name__} needs {key}=$"):
            kind(mlp(), **{k: value for k, value in given.items() if k != key})
        with pytest.raises(ValueError, match=rf"^{key}=0.0: must be above 0$"):
            kind(mlp(), **given | {key: 0.0})


@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_an_update_goes_along_what_was_probed(name: str) -> None:
    """At every step, refreshes of thresholds included: it draws no key that no probe has drawn."""
    model = mlp()
    opt: Any = made(name, model)
    probed: set[Any] = set()
    updated: set[Any] = set()
    of_update = [False]
    mover, apply = opt.direction.mover, opt._apply

    def noted(step: int, move: Any) -> Any:
        (updated if of_update[0] else probed).update(t.key for t in move.terms)
        return mover(step, move)

    def applied(scalars: Sequence[float]) -> None:
        of_update[0] = True
        apply(scalars)
        of_update[0] = False

    opt.direction.mover, opt._apply = noted, applied
    for step in range(5):
        updated.clear()
        opt.step(closure_of(model))
        assert updated
        assert updated <= probed
        assert any(key.step == step for key in updated)


@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_what_fails_while_losses_are_measured_changes_nothing(name: str) -> None:
    model = mlp()
    opt = made(name, model)
    closure = closure_of(model)
    opt.step(closure)
    before, state, numbers = weights_of(model), state_of(opt), opt.snapshot()[0]
    number = opt.estimator.forwards(opt.num_steps)
    for failing in sorted({*range(min(number, 4)), number // 2, number - 1}):  # of up to 33
        calls = [0]

        def closure_that_fails(failing: int = failing, calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            if calls[0] > failing:
                raise RuntimeError("no loss")
            return closure()

        with pytest.raises(RuntimeError, match="no loss"):
            opt.step(Losses(closure_that_fails))
        assert same(weights_of(model), before)
        assert same(state_of(opt), state)
        assert opt.snapshot()[0] == numbers


@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_forwards_counted_are_forwards_made(name: str) -> None:
    model = mlp()
    opt, closure, calls = made(name, model), closure_of(model), [0]

    def counted() -> Tensor:
        calls[0] += 1
        return closure()

    for _ in range(4):
        calls[0] = 0
        assert opt.step(Losses(counted)).num_forwards == calls[0]


@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_a_plan_counts_forwards_as_steps_do(name: str) -> None:
    """In all, and loss by loss; of a search that takes more than one try, the plan counts one."""
    model = mlp()
    opt = made(name, model)
    planned = losses.forwards_of_training(opt, 4), sum(losses.forwards_by_loss(opt, 4).values())
    counted = sum(opt.step(closure_of(model)).num_forwards for _ in range(4))
    if name in ("bf_ssd", "zoro_fa"):
        assert max(planned) <= counted
    else:
        assert planned == (counted, counted)


@pytest.mark.parametrize("name", SHARING)
def test_a_step_says_when_it_has_all_its_losses(name: str) -> None:
    """Once, after its last forward and before it writes; not if a loss is not finite."""
    model = mlp()
    opt, said = made(name, model), list[str]()

    class Noting(Losses):
        factor = 1.0

        def __call__(self) -> Tensor:
            said.append("loss")
            return super().__call__() * self.factor

        def of(self, objective: str) -> Callable[[], Tensor]:
            return self

        def measured(self) -> None:
            said.append("measured")
            assert same(weights_of(model), before)

    closure = Noting(squares_of(model))
    for _ in range(3):
        before = weights_of(model)
        said.clear()
        record = opt.step(closure)
        assert said == ["loss"] * record.num_forwards + ["measured"]
    closure.factor = math.nan
    said.clear()
    with pytest.raises(NonFiniteLoss):
        opt.step(closure)
    assert set(said) == {"loss"}


class Square(nn.Module):
    """A quadratic over one tensor."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, generator=seeded(seed)))

    def forward(self) -> Tensor:
        return (self.w.double() - 1).square().sum()


class ByName(nn.Module):
    """Named quadratics, registered in some order."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, Square(len(name)))

    def forward(self) -> Tensor:
        return torch.stack([module() for _, module in sorted(self._modules.items())]).sum()  # type: ignore[misc]  # there is a module by each name


@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_the_order_of_tensors_changes_nothing(name: str) -> None:
    names, found = ["a", "10", "200"], []  # two of them are layers
    for order in (names, names[::-1]):
        model = ByName(order)
        opt = made(name, model)
        records = [opt.step(Losses(model)) for _ in range(4)]
        found.append((weights_of(model), [r.projected_grad for r in records]))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("name", REPLAYING)
def test_a_replay_is_the_run(name: str) -> None:
    """Weights and state bit for bit, from the recorded scalars alone; and it is the same method."""
    first, second = mlp(), mlp()
    ran, replayed = made(name, first), made(name, second)
    closure = closure_of(first)
    for _ in range(5):
        replayed.replay(1e-2, ran.step(closure).scalars)
    assert same(weights_of(first), weights_of(second))
    assert same(state_of(ran), state_of(replayed))
    assert ran.identity() == replayed.identity()


@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_a_run_goes_on_from_any_step(name: str) -> None:
    """The next step, from what is kept of any step, leaves what it left in the run."""
    whole = mlp()
    opt = made(name, whole)
    saved = []
    for _ in range(6):
        numbers, tensors = opt.snapshot()
        saved.append((copy.deepcopy(whole), numbers, {n: x.clone() for n, x in tensors.items()}))
        opt.step(closure_of(whole))
    for (model, numbers, tensors), after in itertools.pairwise(saved):
        again = made(name, model)
        again.restore(numbers, tensors)
        again.step(closure_of(model))
        assert same(weights_of(model), weights_of(after[0]))
        assert again.snapshot()[0] == after[1]
        assert same(state_of(again), {name: bits(x) for name, x in after[2].items()})


@pytest.mark.parametrize("name", REPLAYING)
def test_only_what_a_probe_has_moved_is_updated(name: str) -> None:
    model = mlp()
    opt: Any = made(name, model, mask_refresh_every=0)
    moved: dict[str, Tensor] = {}
    mover = opt.direction.mover

    def noted(step: int, move: Any) -> Any:
        found = mover(step, move)
        for target in opt.targets:
            out = torch.empty_like(target.flat)
            found.whole(target.parameter, out)
            moved[target.name] |= (out != target.flat).view(target.parameter.shape)
        return found

    apply = opt._apply

    def applied(scalars: Sequence[float]) -> None:
        opt.direction.mover = mover
        apply(scalars)

    opt._apply = applied
    for _ in range(4):
        before = weights_of(model)
        moved.update((n, torch.zeros_like(x, dtype=torch.bool)) for n, x in before.items())
        opt.direction.mover = noted
        opt.step(closure_of(model))
        for tensor, now in weights_of(model).items():
            assert not ((now != before[tensor]) & ~moved[tensor]).any()


@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_blocks_may_be_trained_alone(name: str) -> None:
    """Nothing else moves; the tensors of the network are of layers 0, 2 and 3."""
    model = mlp()
    opt = made(name, model, layers="2-3", sparsity=0.0)
    names = {n for n in weights_of(model) if n.startswith(("2.", "3."))}
    assert set(opt.trained) == names
    before = weights_of(model)
    for _ in range(2):
        opt.step(closure_of(model))
    now = weights_of(model)
    moved = {n for n in before if not torch.equal(now[n], before[n])}
    assert moved  # of a sparse method not all
    assert moved <= names


class Ranks:
    """Processes that share the queries of a step, played by threads.

    They measure in turns: derivatives are of one thread at a time, whoever asks for them.
    """

    def __init__(self, num: int) -> None:
        self._turn = threading.Lock()
        self._barrier = threading.Barrier(num)
        self._found: list[Mapping[int, Sequence[float]]] = [{}] * num
        self._tensors = [torch.zeros(())] * num

    def closure(self, rank: int, loss: Callable[[], Tensor]) -> Any:
        outer = self

        class Closure:
            def __call__(self) -> Tensor:
                return loss()

            def queries(self, num: int) -> Sequence[int]:
                assert outer._turn.acquire(timeout=60)
                return range(num)[rank :: len(outer._found)]

            def join(
                self, losses: Mapping[int, Sequence[float]], sizes: Sequence[int]
            ) -> list[list[float]]:
                outer._turn.release()
                outer._found[rank] = losses
                outer._barrier.wait(60)
                joined = {i: list(x) for found in outer._found for i, x in found.items()}
                outer._barrier.wait(60)
                return [joined[i] for i in range(len(sizes))]

            join_parts = join

            def join_tensor(self, tensor: Tensor) -> Tensor:
                outer._tensors[rank] = tensor
                outer._barrier.wait(60)
                total = torch.stack(outer._tensors).sum(0)
                outer._barrier.wait(60)
                return total

            def of(self, objective: str) -> "Closure":
                return self

        return Closure()


@pytest.mark.parametrize("name", SHARING)
def test_two_ranks_make_the_steps_of_one(name: str) -> None:
    alone, models = mlp(), [mlp(), mlp()]
    of_one = made(name, alone, num_queries=2)
    for _ in range(3):
        of_one.step(closure_of(alone))
    ranks = Ranks(2)

    def steps(rank: int) -> None:
        opt = made(name, models[rank], num_queries=2)
        for _ in range(3):
            opt.step(ranks.closure(rank, closure_of(models[rank])))

    threads = [threading.Thread(target=steps, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in models:
        assert same(weights_of(model), weights_of(alone))


@pytest.mark.parametrize("name", SHARING)
def test_there_are_as_many_queries_to_share_as_the_class_says(name: str) -> None:
    """At once, in some step; other losses of it, such as those of a line search, are fewer."""
    values = {"num_queries": 3, "num_blocks": 2, "num_epochs": 2, "schedule_steps": 2}
    model = mlp()
    opt, most = made(name, model, **values), list[int]()

    class Alone(Losses):
        def queries(self, num: int) -> Sequence[int]:
            asked.append(num)
            return range(num)

        def join(self, losses: Mapping[int, Sequence[float]], sizes: object) -> list[Any]:
            return list(losses.values())

        join_parts = join

        def join_tensor(self, tensor: Tensor) -> Tensor:
            return tensor

        def of(self, objective: str) -> Callable[[], Tensor]:
            return self

    closure = Alone(squares_of(model))
    for _ in range(3):
        asked = list[int]()
        opt.step(closure)
        most.append(max(asked))
    node = node_of(name)
    names, declared = shared_by(node | {k: v for k, v in values.items() if k in node})
    assert declared is not None
    assert set(names) <= node.keys()
    assert 1 <= declared <= max(most)


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_gives_every_argument_and_no_other(name: str) -> None:
    node = node_of(name)
    found = describe(node)
    assert found is not None
    assert node.keys() - _BESIDE == found.keys.keys()
    assert ("objective" in node) == found.traits["compares_losses"]


def test_each_is_listed_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "methods"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert lines.keys() >= set(NAMES)
    assert all(lines[name].endswith((".", "?")) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"method={name}", *_TINY.split()]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"toy | tiny-llama | {name} |")
    assert "held all the time" in said


@pytest.mark.parametrize("name", NAMES)
def test_each_trains_and_is_replayed(
    name: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", f"method={name}", *_TINY.split(), f"runs_dir={tmp_path}"]
    if trait(node_of(name), "takes_steps", default=True):
        words += ["steps=3", "batch_size=2", "eval_every=2", "lr_schedule=constant"]
        words += ["zero_shot=false"]
        if node_of(name).get("num_queries", 1) > 16:
            words += ["method.num_queries=4"]
    if "executor" in node_of(name):
        words += ["method.executor=sequential"]  # to time another takes as long as the steps
    assert main(words) == 0
    (run,) = (tmp_path / "default").iterdir()
    assert (run / "result.json").exists()
    if "steps=3" in words:  # a constant lr: the finished run goes on
        assert main([word if word != "steps=3" else "steps=4" for word in words]) == 0
    if trait(node_of(name), "replays", default=False):
        assert main(["replay", str(run), "--split", "none"]) == 0
    capsys.readouterr()

"""Say what the stages of a run need on top of the model: evaluation, training, checkpoints.

What differs between methods is asked by the short functions at the end of this file alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from smezo_cli.config.method_keys import trait
from smezo_cli.config.settings import Settings
from smezo_cli.plan import losses, masks
from smezo_cli.plan.dry_run import DryRun
from smezo_cli.plan.trace import Keep, KeepThin, bytes_of, trace

# Measured on Linux with torch 2.13: Numba, LLVM and the compiled passes.
_NUMBA = 100_000_000

_THRESHOLD = 28  # bytes that masks.kth_magnitude takes for each entry of a chunk

STEP, TAIL = "step", "backpropagation, gradients included"
SCRATCH = "scratch of probes"


@dataclass(frozen=True)
class Needs:
    """Hold what the training takes, in bytes by name.

    Attributes:
        held: from its beginning to its end.
        stages: on top of that, one after the other.
    """

    held: dict[str, int]
    stages: dict[str, int]


def evaluation(run: DryRun) -> dict[str, int]:
    """Return the bytes of a batch of an evaluation and, of a generation task, of the answers."""
    import torch

    from smezo_cli.scoring import scorer as scoring

    limit = scoring.EVAL_TOKENS if run.device == "cpu" else scoring.EVAL_TOKENS_GPU
    own, shows = run.lengths.own, run.lengths.demonstrated > 0
    count = max(1, limit // run.rows(1, own)[0].num_tokens)
    rows = run.rows(count, own)
    if shows:  # rows of another first token share nothing but the demonstrations
        rows = [run.demonstrated(row, 1 + i % 2) for i, row in enumerate(rows * 2)]
    scorer = run.scorer()
    scorer.holds_common = shows

    def evaluate() -> None:
        with scorer.holding(rows):
            scorer.scores(rows[:count])

    with torch.no_grad():
        found = {"evaluation": run.count(evaluate)[0]}
        if run.kind == "generation":
            found["answers"] = run.count(run.generate)[0]
    return {name: size + run.cast_bytes for name, size in found.items()}


def training(run: DryRun, method: Any, capacity: int) -> Needs:
    """Return what the training by a method needs.

    Args:
        run: the model and its rows.
        method: from :func:`method_on_meta`.
        capacity: bytes of the device.
    """
    if not takes_steps(method):
        return Needs({}, {})
    if perturbs(method):
        return _by_perturbations(run, method, capacity)
    return _by_gradients(run, method)


# --- perturbations ----------------------------------------------------------------------------


def _by_perturbations(run: DryRun, method: Any, capacity: int) -> Needs:
    import torch

    from smezo_cli.zo.directions import dense

    sizes = [target.parameter.numel() for target in method.targets]
    weights, largest = sum(sizes), max(sizes)
    held, found = dict[str, int](), dict[str, int]()
    if method.state_bytes:
        held["optimizer state"] = method.state_bytes
    compiles = compiles_passes(run, method)
    if compiles and run.device == "cpu":
        held["Numba"] = _NUMBA
    # Thresholds chunk by chunk, unless every weight is active; active weights are counted by
    # the mask of one tensor.
    found["thresholds"] = max(_THRESHOLD * _threshold_chunk(run, method, largest), largest)
    batch = run.micro_batch()
    if writes_in_place(method):
        scorer = run.scorer()
        with torch.no_grad():
            forward = run.count(_objective(run, scorer, batch))[0] + run.cast_bytes
        # eps m z and the mask of every weight; one tensor in float32, moved and chosen.
        kept = weights * (dense.KEPT + 4)
        found[STEP] = kept + max(forward, 12 * largest)
        if method.tail is not None:
            found[TAIL] = kept + _backward_of_tail(run, method)
        return Needs(held, found)
    noise = noise_bytes(run, method, compiles=compiles, capacity=capacity)
    points = points_at_once(method)
    step, copies = _probed(run, method, batch)
    held[SCRATCH] = points * copies
    found[STEP] = points * step + noise
    if carries_tangents(method):
        # Its self-check compares two plain losses, by kept noise; the update fills that anew.
        tangents, _ = _probed(run, method, batch, with_tangents=True)
        found[STEP] = max(tangents, found[STEP])
    if method.tail is not None:
        found[TAIL] = noise + _backward_of_tail(run, method)
    pair, _ = _probed(run, method, batch[:2])
    # The self-check perturbs some tensors in place, and puts an exact copy of them back.
    saved = _checked_together(run, method)
    found["self-check"] = saved * run.dtype.itemsize + min(saved * dense.KEPT, noise) + pair
    return Needs(held, found)


def making_a_mask(run: DryRun) -> int:
    """Return the bytes that making a mask takes beside the model as it was loaded.

    None, if the run takes the mask of another one.
    """
    if run.settings.method.get("mask_from") is not None:
        return 0
    method = method_on_meta(run)  # before there is a mask, all weights are scored
    scores = sum(target.parameter.numel() for target in method.targets) * method.score_bytes
    return int(scores) + _backward_of_one(run, method)


def _backward_of_one(run: DryRun, method: Any) -> int:
    """Return the bytes of a backpropagation of one row that drops each gradient at once."""
    scorer, row = run.scorer(), run.micro_batch()[:1]
    named = dict(run.computing.named_parameters())

    def drop(parameter: Any) -> None:
        parameter.grad = None

    asked = {name: parameter.requires_grad for name, parameter in named.items()}
    hooks = []
    for name, parameter in named.items():
        parameter.requires_grad_(name in method.trained)
        if name in method.trained:
            hooks.append(parameter.register_post_accumulate_grad_hook(drop))
    found, _ = run.count(lambda: scorer.loss(row).backward())
    for hook in hooks:
        hook.remove()
    for name, parameter in named.items():
        parameter.requires_grad_(asked[name])
    return found + run.cast_bytes


def _threshold_chunk(run: DryRun, method: Any, largest: int) -> int:
    """Return how many entries of the largest tensor are sorted at once."""
    from smezo_cli.zo.selections.masks import CHUNK

    has_thresholds = run.settings.sparsity and not method.needs_mask
    return min(CHUNK, largest) if has_thresholds else 0


def _objective(run: DryRun, scorer: Any, batch: Sequence[Any]) -> Callable[[], Any]:
    """Return the forwards of what steps lower, without what follows from their logits on a CPU."""
    objective = objective_of(run.settings)
    if objective == "f1":
        return run.generate
    compute = scorer.loss if objective == "loss" else scorer.scores
    return lambda: compute(batch)


def _probed(
    run: DryRun, method: Any, batch: Sequence[Any], *, with_tangents: bool = False
) -> tuple[int, int]:
    """Return the bytes that a loss at moved weights needs for a while, and those of the scratch.

    The scratch stays; the probe of the run itself goes through the model.

    Args:
        run: the model and its rows.
        method: moves its targets.
        batch: rows of the loss.
        with_tangents: the loss is computed together with its derivative along a direction.
    """
    import torch

    from smezo_cli.zo.points import Points
    from smezo_cli.zo.probe import FunctionalProbe
    from smezo_cli.zo.tangent import TangentMover, derivative

    named = dict(run.computing.named_parameters())
    probe = FunctionalProbe(run.computing, [named[target.name] for target in method.targets])
    compute = _objective(run, run.scorer(), batch)
    mover: Any = Keep()
    if (at_once := points_of_a_batch(method)) and not with_tangents:
        ranks = {t.name: method.direction.thin_rank(t) for t in method.targets}
        thin = {id(named[name]): rank for name, rank in ranks.items() if rank is not None}
        shared: dict[int, Any] = {}
        batched = Points(run.computing, probe, method.executor)
        movers = [KeepThin(thin, shared) for _ in range(at_once)]

    def measure() -> None:
        if with_tangents:
            derivative(compute, TangentMover(mover), probe)
            return
        with batched.first(movers) if at_once else probe.at(mover):
            compute()

    with torch.no_grad():
        peak, left = run.count(measure, is_fused=not with_tangents)
    # The scratch has the dtype of the weights.
    return peak - left + run.cast_bytes, left * run.dtype.itemsize // run.compute_dtype.itemsize


def _backward_of_tail(run: DryRun, method: Any) -> int:
    """Return the most bytes of a forward and backward of what is trained by backpropagation.

    Beside the activations one gradient at a time, and what its tensor's update takes; or all
    gradients, where they add up over micro-batches.
    """
    tail = method.tail
    if run.computing is not run.model:
        tail = method_on_meta(run, run.computing).tail
    own = losses.rows_of(method, tail.objective, run.settings, run.lengths.training)
    number, size = own.number or run.settings.batch_size, run.micro_batch_size
    rows, scorer = run.rows(number, own.tokens), run.scorer()
    parts = [partial(scorer.loss, rows[i : i + size]) for i in range(0, number, size)]
    found, _ = run.count(lambda: tail.apply(_InParts(parts), 1.0, 0))
    if run.compute_dtype != run.dtype:
        # Gradients are of the weights' dtype.
        sizes = [p.numel() for p in tail.parameters.values()]
        found += (max(sizes) if len(parts) == 1 else sum(sizes)) * run.dtype.itemsize
    return found


class _InParts:
    """Return the loss of the rows of a step, in micro-batches; see :mod:`smezo_cli.zo.step`."""

    def __init__(self, parts: Sequence[Callable[[], Any]]) -> None:
        self._parts = parts

    def __call__(self) -> Any:
        return self._parts[0]()

    def parts(self) -> Sequence[Callable[[], Any]]:
        """See :class:`smezo_cli.zo.step.InParts`."""
        return self._parts

    def of(self, objective: str) -> "_InParts":
        """See :class:`smezo_cli.zo.step.WithObjectives`: these rows are those of the objective."""
        return self


def _checked_together(run: DryRun, method: Any) -> int:
    """Return how many weights the self-check moves together, at most."""
    from smezo_cli.zo.probe import FunctionalProbe
    from smezo_cli.zo.reached import checked_together, kinds_to_check

    trained = {target.name: target.parameter for target in method.targets}
    names = {id(parameter): name for name, parameter in trained.items()}
    total = sum(p.numel() for p in trained.values())
    probe = FunctionalProbe(run.model, list(trained.values()))
    kinds = kinds_to_check(probe, names, total)
    sizes = [[int(trained[n].numel()) for n in chosen] for chosen in kinds.values()]
    return max(sum(of[part]) for of in sizes for part in checked_together(of, total))


# --- gradients --------------------------------------------------------------------------------


def _by_gradients(run: DryRun, method: Any) -> Needs:
    parameters = list(method.trained.values())
    size = bytes_of(parameters)
    step, state = _optimizer_step(run, parameters)
    return Needs(
        {"optimizer state": state},
        {
            "forward and backward, gradients included": _forward_and_backward(run, method),
            "update, gradients included": step - state + size,
            # On a CPU the allocator still holds the freed gradients then, in pieces (measured).
            "checkpoint: a copy of the optimizer state": state
            + (size if run.device == "cpu" else 0),
        },
    )


def _forward_and_backward(run: DryRun, method: Any) -> int:
    """Return the most bytes of a step before its update, the gradients among them."""
    batch = run.micro_batch()
    scorer = run.scorer()
    named = dict(run.computing.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(name in method.trained)
    run.computing.train()
    found, _ = run.count(lambda: scorer.loss(batch).backward())
    if run.settings.batch_size > run.micro_batch_size:
        # Gradients stay from one micro-batch to the next, so that they lie beside activations.
        gradients = [p.grad for p in named.values() if p.grad is not None]
        held = [*named.values(), *run.computing.buffers(), *gradients]
        again, _ = trace(held, lambda: scorer.loss(batch).backward())
        found = max(found, again + bytes_of(gradients))
    for parameter in named.values():
        parameter.grad = None
    if run.compute_dtype != run.dtype:
        # Gradients are of the weights' dtype; the cast weights stay until they are read back.
        found += sum(p.numel() for p in method.trained.values()) * run.dtype.itemsize
    return found


def _optimizer_step(run: DryRun, parameters: Sequence[Any]) -> tuple[int, int]:
    """Return the most bytes of an update with a new optimizer, and those of the state it leaves."""
    import torch

    from smezo_cli.config.build import build

    optimizer = build(run.settings.method["optimizer"], "method.optimizer", params=parameters)
    for group in optimizer.param_groups:
        if run.device == "cuda" and "foreach" in group and group["foreach"] is None:
            group["foreach"] = True  # torch's own choice there
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    step, _ = trace([*parameters, *(p.grad for p in parameters)], optimizer.step)
    state = bytes_of(
        value
        for of_one in optimizer.state.values()
        for value in of_one.values()
        if isinstance(value, torch.Tensor)
    )
    return step, state


# --- what is asked of a method ----------------------------------------------------------------


def method_on_meta(run: DryRun, model: Any = None, index: Mapping[str, Any] | None = None) -> Any:
    """Build the method of the settings for the model, which has no contents, or for this one.

    Args:
        run: the model and its rows.
        model: to train in place of the run's.
        index: places of the mask, of a method that needs one; None: before there is one.
    """
    from smezo_cli.config.build import build
    from smezo_cli.zo.quantised import quantise

    node = masks.node_beside(run)
    if "sparsity" in node:  # there are no weights to find thresholds of
        node = node | {"sparsity": 0.0}
    if run.computing is not run.model and _trains_scales(node):  # which have names of their own
        quantise(run.computing, node["weight_bits"], node["group_size"])
    runtime = {
        "model": run.model if model is None else model,
        "seed": run.settings.seed,
        "backend": "eager",
        "check": False,
    }
    if index is not None:
        runtime["index"] = index
    return build(node, "method", **runtime)


def _trains_scales(node: Mapping[str, Any]) -> bool:
    """Return whether a method trains what stands beside codes, not the codes."""
    moves = trait(node, "moves_codes", default=False)
    return trait(node, "holds_codes", default=False) and not moves


def takes_steps(method: Any) -> bool:
    """Return whether the method trains weights of the model."""
    return bool(method.takes_steps)


def perturbs(method: Any) -> bool:
    """Return whether a step is made of losses at moved weights."""
    return bool(method.compares_losses)


def records_steps(method: Any) -> bool:
    """Return whether steps are recorded as a few numbers that the weights can be made from."""
    return bool(method.replays)


def writes_in_place(method: Any) -> bool:
    """Return whether the weights themselves are moved for a loss."""
    return bool(method.executor == "in_place")


def points_at_once(method: Any) -> int:
    """Return how many moved copies of a module live at once, each with its activations."""
    if method.executor == "auto":
        return 2 if method.measures_pairs else 1
    return 2 if method.executor == "lockstep" else 1


def points_of_a_batch(method: Any) -> int:
    """Return how many points one forward computes, and without copies of thin products; else 0."""
    if method.executor == "batched":
        return int(method.forwards(0))
    return int(method.executor == "side_path")


def carries_tangents(method: Any) -> bool:
    """Return whether a step computes derivatives along directions, by forwards alone."""
    return bool(method.needs_gradient) and method.tail is None


def compiles_passes(run: DryRun, method: Any) -> bool:
    """Return whether passes over the weights will be compiled, as a run decides by itself."""
    from smezo_cli.zo.directions import dense
    from smezo_cli.zo.passes import choose

    if not method.direction.has_compiled_passes:
        return False
    if run.settings.compile != "auto":
        return bool(run.settings.compile)
    if run.device == "cuda":
        return True
    total = sum(p.numel() for p in run.model.parameters())
    worth_it = total * run.settings.steps >= choose.WORTH_IT
    return bool(worth_it and method.num_weights >= dense.WORTH_COMPILING)


def noise_bytes(run: DryRun, method: Any, *, compiles: bool, capacity: int) -> int:
    """Return the bytes of noise that a step keeps between its passes, as its direction says."""
    on_cpu = run.device == "cpu"
    return int(method.direction.noise_bytes(compiles=compiles, on_cpu=on_cpu, free=capacity))


def objective_of(settings: Settings) -> str:
    """Return what steps lower: "loss", "accuracy" or "f1"."""
    return str(settings.method.get("objective", "loss"))


def num_demonstrations(settings: Settings) -> int:
    """Return how many training rows stand before each row of an evaluation."""
    return int(settings.method.get("num_demonstrations", 0))


def fits_probe(method: Any) -> bool:
    """Return whether a probe is fitted to hidden states of the training rows."""
    return not getattr(method, "scores_words", True)

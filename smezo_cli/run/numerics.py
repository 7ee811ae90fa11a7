"""Measure what low precision does to a run: rounding of weights, noise of losses."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smezo_cli.machine.waiting import waiting
from smezo_cli.methods.base import compares_losses
from smezo_cli.run.batches import Batches
from smezo_cli.run.begin import Run
from smezo_cli.run.measure import Measure
from smezo_cli.scoring.batching import Found
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.float32 import in_float32
from smezo_cli.scoring.parts import of_one_part
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.store.notes import Notes
from smezo_cli.zo.noise import hash64, stream_key
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.quantised import QuantisedLinear
from smezo_cli.zo.step import NonFiniteLoss, StepRecord

if TYPE_CHECKING:
    from smezo_cli.methods.base import Method


SAMPLE = 4096  # entries that are watched of each tensor

PROBED_QUERIES = 2  # of the loss noise, two losses each


# --- what steps do to the weights --------------------------------------------------------------


@dataclass
class _Sample:
    """Hold some entries of a tensor: all of a small one, else drawn with replacement."""

    name: str
    parameter: nn.Parameter
    index: Tensor | None  # int32 (int64 for huge tensors), flat; None: all entries
    base: Tensor  # of the base model, in the parameter's dtype
    layer: QuantisedLinear | None  # that holds the parameter, where it is codes

    @property
    def now(self) -> Tensor:
        """Return the present entries, a copy; of codes the weights that they stand for."""
        if self.layer is not None:
            return self.layer.values(None if self.index is None else self.index.long())
        flat = self.parameter.detach().view(-1)
        return flat.clone() if self.index is None else flat.index_select(0, self.index)

    @property
    def numel(self) -> int:
        """Return weights of the tensor."""
        return self.parameter.numel() if self.layer is None else self.layer.num_weights

    @property
    def weight(self) -> float:
        """Return entries of the tensor for which one of these stands."""
        return self.numel / len(self.base)


class Numerics:
    """Measure how far weights moved since the base model, and which updates were rounded away.

    These are estimates from at most :data:`SAMPLE` entries of each tensor, drawn by a key and
    weighted by the size of the tensor; exact for tensors that are not larger. At an evaluation:

    * ``moved_share``: fraction of the trained weights that differ from the base model's;
    * ``rms_move``: root mean square of the difference, over all trained weights;
    * ``underflow``: fraction of the weights under the mask that the last update before the
      evaluation left as they were though their coefficient was not 0; None for first-order methods.

    Args:
        method: its ``trained`` tensors hold the base model's weights now.
        seed: draws the sample.
        notes: of the run; the values lie in ``notes["numerics"]``.
    """

    def __init__(self, method: "Method", seed: int, notes: Notes) -> None:
        self._method = method if compares_losses(method) else None
        self._notes = notes
        self._samples: list[_Sample] = []
        self._before: list[Tensor] = []
        layers: Mapping[str, QuantisedLinear] = getattr(method, "layers", {})
        for name, parameter in method.trained.items():
            sample = _Sample(name, parameter, None, torch.empty(0), layers.get(name))
            numel, index = sample.numel, None
            if numel > SAMPLE:
                key = torch.tensor(stream_key(seed, "numerics", name))
                drawn = (hash64(torch.arange(SAMPLE), key) % numel).sort().values
                drawn = drawn.to(torch.int32) if numel < 2**31 else drawn
                index = drawn.to(parameter.device)
            sample.index = index
            sample.base = sample.now
            self._samples.append(sample)

    @property
    def _values(self) -> dict[str, Any]:
        return self._notes.setdefault("numerics", {})

    def before_step(self, is_last: bool) -> None:
        """Keep the sampled weights if dev is evaluated right after the step."""
        if is_last and self._method is not None:
            self._before = [s.now for s in self._samples]

    def after_step(self, record: StepRecord) -> None:
        """Note which of the weights kept the update left as they were."""
        method, before, self._before = self._method, self._before, []
        if method is None or not before:
            return
        self._values["underflow"] = None
        if not any(record.projected_grad):
            return
        active = lost = 0.0
        for s, was in zip(self._samples, before, strict=True):
            index = torch.arange(len(was), device=was.device) if s.index is None else s.index.long()
            mask = method.mask_at(s.parameter, was, index, method.num_steps - 1)
            active += s.weight * int(mask.sum())
            lost += s.weight * int((mask & (s.now == was)).sum())
        self._values["underflow"] = lost / active if active else None

    def measure(self) -> dict[str, Any]:
        """Return, and note, how far the present weights have moved."""
        moved = squares = 0.0
        total = sum(s.numel for s in self._samples)
        for s in self._samples:
            now = s.now
            moved += s.weight * int((now != s.base).sum())
            squares += s.weight * float((now.double() - s.base.double()).square().sum())
        self._values.update({"moved_share": moved / total, "rms_move": math.sqrt(squares / total)})
        self._values["sampled"] = sum(len(s.base) for s in self._samples)
        names = ("moved_share", "rms_move", "underflow")
        return {name: self._values[name] for name in names if self._values.get(name) is not None}


def loss_noise(
    method: ZeroOrder,
    scorer: Scorer,
    rows: Sequence[Candidates],
    objective: str = "loss",
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure how far losses in low precision are from those of the same weights in float32.

    It takes one batch at four probes of the next step, theta +- eps z of two queries, stored in the
    weights' dtype: four forwards in the run's precision and four in float32. For a run with another
    objective, "losses" are that objective. ``between`` is called before each forward; it may raise.

    Returns:
        ``loss_error_rms`` and ``loss_error_mean`` of the differences; ``loss_noise``, their
        standard deviation, since what all probes share cancels in a projected gradient;
        ``projected_grad_noise`` = loss_noise / (sqrt(2) eps), the standard deviation that it gives
        to a projected gradient [L(+) - L(-)] / (2 eps); ``noise_forwards``, not counted elsewhere.

    Raises:
        NonFiniteLoss: a loss is NaN or infinite.
        RuntimeError: the model mixes dtypes of its own accord, or memory does not suffice.
    """
    exact = Scorer(scorer.model, scorer.tokenizer, places_before=scorer.places_before)
    Found(scorer.batching, scorer.batching_of_answers).to(exact)
    scorer.model.eval()
    errors: list[float] = []

    def measured(by: Scorer) -> Tensor:
        between()
        return by.objective(rows, objective)

    for query in range(PROBED_QUERIES):
        low = method.losses_at(lambda: measured(scorer), query)
        with in_float32(scorer.model):
            high = method.losses_at(lambda: measured(exact), query)
        errors += [a - b for a, b in zip(low, high, strict=True)]
    if not all(map(math.isfinite, errors)):
        raise NonFiniteLoss("a loss is not finite")
    noise = statistics.stdev(errors)
    return {
        "loss_error_rms": math.sqrt(statistics.fmean(e * e for e in errors)),
        "loss_error_mean": statistics.fmean(errors),
        "loss_noise": noise,
        "projected_grad_noise": noise / (math.sqrt(2) * method.param_groups[0]["eps"]),
        "noise_forwards": 2 * len(errors),
    }


def measured_noise(
    run: Run, method: "Method", measure: Measure, batches: Batches
) -> dict[str, Any]:
    """Return :func:`loss_noise` of a run in low precision, at its tested weights; else nothing.

    A line says why where it cannot be measured, as the run has its result.

    Raises:
        Stopped: asked to, between two forwards.
    """
    s = run.settings
    dtypes = {s.dtype, s.compute_dtype or s.dtype}
    if dtypes == {"float32"} or not compares_losses(method):
        return {}
    try:
        batch = of_one_part(batches.rows(run.state.step))[: measure.size]
        with waiting("measuring the noise of losses"):
            return loss_noise(method, measure.scorer, batch, run.objective, run.check_stop)
    except (RuntimeError, MemoryError, NonFiniteLoss) as error:
        line = str(error).partition("\n")[0]
        run.say(f"  the loss noise of {s.dtype} was not measured: {line}")
        return {}

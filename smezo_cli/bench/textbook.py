"""Make steps of MeZO and Sparse-MeZO as the papers' pseudo-code says, for `smezo bench`.

MeZO: arXiv 2305.17333, Algorithm 1; Sparse-MeZO: arXiv 2402.15751, its algorithm in the vanilla
form, whose mask is kept for the step. Four passes over the weights in place, each of which draws
z anew from a generator that was set back to the step's seed, and a forward for every candidate
that computes all logits. Nothing is made slower than the papers say, and nothing faster: this is
what is compared with, and no way to train.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from smezo_cli.scoring.candidates import Candidates
from smezo_cli.zo.noise import stream_key
from smezo_cli.zo.step import Closure, NonFiniteLoss, StepRecord


class Textbook:
    """Make steps of two-sided SGD in place along z ~ N(0, I); a mask may leave weights alone.

    Args:
        model: parameters with ``requires_grad`` are trained.
        lr: step size.
        eps: radius of the probe.
        seed: with the step, seeds the generator.
        thresholds: h of each tensor, from :func:`thresholds` before the first step; none is MeZO,
            without a mask.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        eps: float,
        seed: int = 0,
        thresholds: Sequence[Tensor] = (),
    ) -> None:
        self.lr, self.eps, self.seed = lr, eps, seed
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.thresholds = thresholds
        self.num_steps = 0

    @torch.no_grad()
    def step(self, closure: Closure) -> StepRecord:
        """Make one step; ``closure`` is called twice, at weights that were moved in place.

        Raises:
            NonFiniteLoss: after the weights were put back.
        """
        seed = self.seed_of(self.num_steps)
        # The vanilla form: taken at the unperturbed weights, kept for the four passes.
        masks = [p.abs() <= h for p, h in zip(self.parameters, self.thresholds, strict=False)]
        self._move(seed, self.eps, masks)
        l_plus = float(closure())
        self._move(seed, -2 * self.eps, masks)
        l_minus = float(closure())
        self._move(seed, self.eps, masks)
        if not (math.isfinite(l_plus) and math.isfinite(l_minus)):
            raise NonFiniteLoss(f"loss {l_plus} and {l_minus} at step {self.num_steps}")
        projected_grad = (l_plus - l_minus) / (2 * self.eps)
        self._move(seed, -self.lr * projected_grad, masks)
        self.num_steps += 1
        return StepRecord((l_plus + l_minus) / 2, (projected_grad,), 2)

    def seed_of(self, step: int) -> int:
        """Return what the generators are set back to before each pass of a step, in [0, 2**63)."""
        return stream_key(self.seed, "textbook", step)[0] & (2**63 - 1)

    def _move(self, seed: int, scale: float, masks: Iterable[Tensor]) -> None:
        """Move the weights: theta <- theta + scale m z (PerturbParameters of both papers)."""
        generators = {
            device: torch.Generator(device).manual_seed(seed)
            for device in {p.device for p in self.parameters}
        }
        kept = iter(masks)
        for p in self.parameters:
            z = torch.normal(
                0.0, 1.0, p.shape, dtype=p.dtype, device=p.device, generator=generators[p.device]
            )
            if (mask := next(kept, None)) is not None:
                z.mul_(mask)
            p.add_(z, alpha=scale)


def thresholds(model: nn.Module, sparsity: float) -> list[Tensor]:
    """Return h of each tensor, (): all but ``sparsity`` of its weights are at most so large."""
    found = []
    for p in model.parameters():
        if p.requires_grad:
            magnitudes = p.detach().abs().flatten()
            kept = max(1, round((1 - sparsity) * len(magnitudes)))
            found.append(magnitudes.kthvalue(kept).values)
    return found


def loss(model: nn.Module, batch: Sequence[Candidates]) -> Tensor:
    """Return the cross-entropy over the candidates' mean log-probabilities, a forward each: ().

    As MeZO computes it (appendix E): each candidate behind its context as a sequence of its own,
    logits of all positions and all tokens; short rows are padded on the right and masked.

    Args:
        model: a causal language model of transformers.
        batch: rows of a classification with the same number of candidates.
    """
    device = next(model.parameters()).device
    scores = []
    for k in range(len(batch[0].full)):
        of_rows = [torch.tensor(row.full[k], device=device) for row in batch]
        ids = pad_sequence(of_rows, batch_first=True)  # (batch, tokens)
        mask = pad_sequence([torch.ones_like(row) for row in of_rows], batch_first=True)
        padded = {} if bool(mask.all()) else {"attention_mask": mask}
        logits = model(input_ids=ids, use_cache=False, **padded).logits  # (..., vocabulary)
        scores.append(torch.stack([_mean_log_p(logits[i], row, k) for i, row in enumerate(batch)]))
    labels = torch.tensor([c.label for c in batch], device=device)
    return F.cross_entropy(torch.stack(scores, dim=1), labels)


def _mean_log_p(logits: Tensor, row: Candidates, k: int) -> Tensor:
    """Return the mean log-probability of the tokens of a candidate: (), from (tokens, words)."""
    end, count = len(row.full[k]), row.num_option[k]
    log_p = F.log_softmax(logits[end - 1 - count : end - 1].float(), dim=-1)
    option = torch.tensor(row.full[k][-count:], device=logits.device)
    return log_p.gather(-1, option[:, None]).mean()

"""Evaluate the rows of a run: on from an earlier stop, shared by its ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from smezo_cli.config.digest import digest
from smezo_cli.run import evaluate
from smezo_cli.run.begin import Run
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.ranks import Ranks
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.scoring.objectives import NonFiniteScore
from smezo_cli.store.partial_scores import Part, PartialScores
from smezo_cli.store.saved import tensors_digest


class SplitNotFinite(NonFiniteScore):
    """Say that a score of a row was NaN or infinite; `split` is the row's."""

    def __init__(self, what: str, split: str) -> None:
        super().__init__(what)
        self.split = split


@dataclass(frozen=True)
class Evaluator:
    """Evaluate rows with the weights that the model holds.

    Attributes:
        run: whose rows they are.
        loaded: task and model.
        partial: what an evaluation that was stopped has scored.
        team: the ranks that share the rows; None: this process scores all.
        as_it_came: whether the model computes without its adapter.
    """

    run: Run
    loaded: Loaded
    partial: PartialScores
    team: Ranks | None
    as_it_came: bool = False

    def __call__(
        self,
        rows: Sequence[Candidates],
        split: str,
        *,
        prompt: int | None = None,
        step: int = 0,
        made: int = 0,
    ) -> Evaluation:
        """Return what the model makes of some rows; of a mixture, of one part after the other.

        Args:
            rows: of the split.
            split: their name.
            prompt: under which they are, all of one part; None: the chosen one, or the chosen ones.
            step: that the model's weights are of.
            made: steps that the other ranks must have made for these weights; 0: they have them.

        Raises:
            Stopped: asked to, between two batches.
            SplitNotFinite: a score is not finite.
        """

        def one(of_part: Sequence[Candidates], name: str) -> Evaluation:
            return self._one(of_part, name, split, prompt, step, made)

        if prompt is not None:
            return one(rows, rows[0].part)
        return evaluate.in_parts(rows, self.loaded.task.weights, one)

    def _one(
        self,
        rows: Sequence[Candidates],
        of_part: str,
        split: str,
        prompt: int | None,
        step: int,
        made: int,
    ) -> Evaluation:
        """Return what the model makes of rows of one task, or of one part."""
        run, team, part = self.run, self.team, self.part(rows, split, step)
        if team is not None:
            team.evaluate(
                split=split,
                part=of_part,
                prompt=run.notes["prompt"] if prompt is None else prompt,
                as_it_came=self.as_it_came,
                step=made,
                scored=sorted(part.scored),
                answered=sorted(part.answered),
            )
        done = len(part.answered if self.loaded.task.kind == "generation" else part.scored)
        what = f"{split} {of_part}".strip()
        if done:
            run.say(f"  {what}: {done} of {len(rows)} rows were scored before the stop")
        bar = run.console.bar(what, len(rows), done)
        try:
            with evaluate.computing(self.loaded.scorer, split):
                return evaluate.evaluate(self.loaded.scorer, rows, bar, run.stopped, team, part)
        except NonFiniteScore as error:
            raise SplitNotFinite(str(error), split) from error

    def without_adapter(self) -> "Evaluator":
        """Return the same for a model that computes without its adapter."""
        return replace(self, as_it_came=True)

    def part(self, rows: Sequence[Candidates], split: str, step: int = 0) -> Part:
        """Return what an evaluation that was stopped has scored of these rows."""
        s, probe = self.run.settings, self.loaded.scorer.probe
        about = {
            "step": step,
            "as_it_came": self.as_it_came,
            "probe": None if probe is None else tensors_digest(probe),
            "settings": digest(self.run.config),
            "model": self.run.notes["model"],
            "batching": self.run.notes["batching"],
            "machine": [str(self.run.device), s.dtype, s.compute_dtype],
        }
        return self.partial.part(about, split, rows)

"""Evaluate the rows of a run: on from an earlier stop, shared by its ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from smezo_cli.config.digest import digest
from smezo_cli.errors import UserError
from smezo_cli.run import evaluate, kept_inputs, score_cache
from smezo_cli.run.begin import Run
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.ranks import Ranks
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.scoring.objectives import NonFiniteScore
from smezo_cli.store.partial_scores import Part, PartialScores
from smezo_cli.store.saved import tensors_digest
from smezo_cli.store.score_cache import ScoreCache

_EVERY = slice(None)


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
        lot: slice = _EVERY,
        step: int = 0,
        made: int = 0,
    ) -> Evaluation:
        """Return what the model makes of some rows; of a mixture, of one part after the other.

        Args:
            rows: of the split.
            split: their name.
            prompt: under which they are, all of one part; None: the chosen one, or the chosen ones.
            lot: of the lots of the rows (:func:`evaluate.lots`), those that are evaluated.
            step: that the model's weights are of.
            made: steps that the other ranks must have made for these weights; 0: they have them.

        Raises:
            Stopped: asked to, between two batches.
            SplitNotFinite: a score is not finite.
        """

        def one(of_part: Sequence[Candidates], name: str) -> Evaluation:
            lots = evaluate.lots(self.run.settings, self.loaded.prompts, split, of_part)[lot]
            found = [self._one(of_part, at, name, split, prompt, step, made) for at in lots]
            return Evaluation.joined(found)

        if prompt is not None:
            return one(rows, rows[0].part)
        return evaluate.in_parts(rows, self.loaded.task.weights, one)

    def _one(
        self,
        rows: Sequence[Candidates],
        lot: slice,
        of_part: str,
        split: str,
        prompt: int | None,
        step: int,
        made: int,
    ) -> Evaluation:
        """Return what the model makes of a lot of the rows of one task, or of one part."""
        rows = rows[lot]
        run, team, scorer = self.run, self.team, self.loaded.scorer
        part = self.part(rows, split, step)
        cache = self._cache() if step == 0 else None
        is_known = cache is not None and part.is_empty and cache.fill(part, rows)
        name = kept_inputs.name_of(split, of_part, prompt)
        keeps = self._keeps_inputs(split, prompt, step)
        if team is not None:
            team.evaluate(
                split=split,
                part=of_part,
                prompt=run.notes["prompt"] if prompt is None else prompt,
                as_it_came=self.as_it_came,
                name=name,
                keeps=keeps,
                lot=[lot.start, lot.stop],
                step=made,
                scored=sorted(part.scored),
                answered=sorted(part.answered),
            )
        done = part.num_done(rows[0].kind)
        what = self._in_words(split, of_part, prompt)
        if is_known:
            run.say(f"  {what}: scores of an earlier run (cache_scores=false computes them anew)")
        elif done:
            run.say(f"  {what}: {done} of {len(rows)} rows were scored before the stop")
        bar = run.console.bar(what, len(rows), done)
        try:
            is_cached = kept_inputs.is_of(self.loaded, self.as_it_came)
            with scorer.forward.evaluating(name, keeps, is_cached):
                found = evaluate.evaluate(scorer, rows, bar, run.stopped, team, part)
        except NonFiniteScore as error:
            raise SplitNotFinite(str(error), split) from error
        finally:
            if scorer.most_at_once:
                run.notes["most_at_once"] = scorer.most_at_once
        # Of batches that were halved on the way no other run has the scores.
        if cache is not None and not is_known and not scorer.most_at_once:
            try:
                cache.keep(rows, found.scores, found.texts)
            except UserError as error:
                run.say(f"  {what}: scores are not kept for other runs: {error}")
        return found

    def _in_words(self, split: str, part: str, prompt: int | None) -> str:
        """Return the name of a split or of a part's, with the prompt if it is one of several."""
        name = f"{split} {part}".strip()
        tried = [k for k, of in enumerate(self.loaded.prompts) if of.part == part]
        if prompt is None or len(tried) == 1:
            return name
        return f"{name} (prompt {tried.index(prompt) + 1} of {len(tried)})"

    def _cache(self) -> ScoreCache | None:
        """Return where scores of the untouched model are kept; None where they are not.

        A probe or demonstrations may have come since the last evaluation.
        """
        return score_cache.of(self.run, self.loaded, self.as_it_came, lambda: self._base_digest)

    @cached_property
    def _base_digest(self) -> str:
        """The digest of the weights that the model came with, which takes a while."""
        return tensors_digest(self.loaded.base_weights())

    def _keeps_inputs(self, split: str, prompt: int | None, step: int) -> bool:
        """Return whether what enters the first trained block is kept, if the run keeps any.

        It is where these rows are scored again. Ranks are not told to forget, so they keep nothing
        under a prompt that another one may beat.
        """
        if not kept_inputs.is_of(self.loaded, self.as_it_came):
            return False
        if split == "test":
            # Once before the training, and once after it; which takes it from the cache.
            return step == 0 and not self.run.settings.cache_inputs
        is_choice = prompt is not None and len(self.loaded.prompts) > 1
        return self.team is None or not is_choice

    def without_adapter(self) -> "Evaluator":
        """Return the same for a model that computes without its adapter."""
        return replace(self, as_it_came=True)

    def part(self, rows: Sequence[Candidates], split: str, step: int = 0) -> Part:
        """Return what an evaluation that was stopped has scored of these rows."""
        notes = self.run.notes
        about = evaluate.scores_follow_from(self.loaded, notes["batching"], step, self.as_it_came)
        about |= {"settings": digest(self.run.config), "model": notes["model"]}
        return self.partial.part(about, split, rows)

"""The training loop: batch -> step -> log -> look at dev -> save. The same for every method."""

import itertools
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smezo_cli.log import Bar, Console, Logger
from smezo_cli.machine.memory import PeakMemory
from smezo_cli.machine.stop import Stopped
from smezo_cli.methods.base import Method
from smezo_cli.ranks import Ranks
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.scoring.objectives import check_scores
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.share import Measure
from smezo_cli.store.folder import RunFolder, State
from smezo_cli.store.partial_scores import Part
from smezo_cli.store.trajectory import Recorder, seconds_between
from smezo_cli.watch import Watch
from smezo_cli.zo.schedule import lr_factor


class Batches:
    """The batch of a step, a function of (seed, step) alone.

    Permutations of all rows, one an epoch, are laid end to end and cut into batches.

    Args:
        rows: of the train split.
        batch_size: of them in a batch.
        seed: of the permutations.
        order: "shuffled"; or "stratified", the rows of each class evenly over the epoch, so that a
            batch inside an epoch has the share of each within one row (two classes; more where
            many small classes meet). The mean over an epoch is the same, the spread of batches is
            smaller (docs/batches.md).
    """

    def __init__(
        self, rows: Sequence[Candidates], batch_size: int, seed: int, order: str = "shuffled"
    ) -> None:
        self._num_rows, self._size, self._seed = len(rows), batch_size, seed
        self._labels = [row.label for row in rows] if order == "stratified" else []
        self._orders: dict[int, list[int]] = {}

    def __call__(self, step: int) -> list[int]:
        """Row numbers of the batch."""
        places = range(step * self._size, (step + 1) * self._size)
        return [self._order(i // self._num_rows)[i % self._num_rows] for i in places]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(self._num_rows))
            rng = random.Random(f"{self._seed}/batches/{epoch}")
            rng.shuffle(order)
            if self._labels:
                order = self._stratified(order, rng)
            self._orders = {k: v for k, v in self._orders.items() if k >= epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch]

    def _stratified(self, order: Sequence[int], rng: random.Random) -> list[int]:
        """The k-th of the n rows of a class comes at (k + u) / n, u being one number a class."""
        sizes = Counter(self._labels)
        start = {label: rng.random() for label in sorted(sizes)}
        met, places = Counter[int](), dict[int, float]()
        for i in order:
            label = self._labels[i]
            places[i] = (met[label] + start[label]) / sizes[label]
            met[label] += 1
        return sorted(order, key=places.__getitem__)


def evaluate(
    scorer: Scorer,
    rows: Sequence[Candidates],
    bar: Bar,
    stopped: Callable[[], bool],
    team: Ranks | None = None,
    part: Part | None = None,
) -> Evaluation:
    """Score every row; of a generation task let the model answer, too.

    Ranks share the batches, which are those of a process alone, and all of them get all scores.

    Args:
        scorer: of the model.
        rows: of one kind.
        bar: moves with them.
        stopped: asked after each batch.
        team: the ranks that share the batches.
        part: what is known already is not computed; receives what is found, also before Stopped.

    Raises:
        Stopped: between two batches, when that was asked for (of some rank).
        NonFiniteScore: a score is not finite; with ranks of all of them, after the last batch.
    """
    scorer.model.eval()
    part = Part(len(rows)) if part is None else part
    first, every = (0, 1) if team is None else (team.rank, team.size)
    answers = rows[0].kind == "generation"
    known = [set(part.scored), set(part.answered)]
    scores = part.table(max(1, *(len(row.full) for row in rows)))
    texts = part.texts
    is_stopping = False
    with bar, scorer.holding(rows):
        batches: Iterator[tuple[list[int], Any]] = scorer.score_all(rows, first, every, known[0])
        if answers:
            batches = itertools.chain(batches, scorer.generate_all(rows, first, every, known[1]))
        while True:
            chosen, batch = next(batches, ([], ()))
            of_batch = [rows[i] for i in chosen]
            if isinstance(batch, Tensor):
                if team is None:
                    check_scores(of_batch, batch)
                scores[chosen] = -math.inf
                scores[chosen, : batch.shape[1]] = batch
                part.scored.update(chosen)
            elif chosen:
                if team is None:
                    check_scores(of_batch, scores[chosen], batch)
                texts |= zip(chosen, batch, strict=True)
                part.answered.update(chosen)
            if chosen and answers != isinstance(batch, Tensor):  # answering takes the time
                bar.step(len(chosen) * every)
            if team is not None:
                # By what all ranks hear: one that stopped by itself would leave the others waiting.
                goes_on = team.goes_on(bool(chosen))
                is_stopping = team.stop_asked
            else:
                goes_on = bool(chosen)
                is_stopping = goes_on and stopped()
            if is_stopping or not goes_on:
                break
        bases = torch.zeros(len(rows)) if rows[0].kind == "choice" and rows[0].base else None
        if bases is not None and not is_stopping:
            for chosen, sums in scorer.log_p_of_bases(rows, first, every):
                bases[chosen] = sums
                if team is None and (is_stopping := stopped()):
                    break
    if team is not None:
        _put_together(part, team, known, answers)
    if is_stopping:
        raise Stopped
    if team is not None and bases is not None:
        bases = team.add_tensor(bases)
    answered = [texts[i] for i in range(len(rows))] if answers else ()
    return Evaluation(rows, part.table(0), answered, bases)


def _put_together(part: Part, team: Ranks, known: Sequence[set[int]], answers: bool) -> None:
    """Let every rank have what all have found; what was known before is rank 0's to give."""
    before = known if team.rank else [set[int](), set[int]()]
    own = part.scored - before[0], part.answered - before[1]
    found = torch.zeros(2, part.num_rows)
    for k, of in enumerate(own):
        found[k, sorted(of)] = 1
    found = team.add_tensor(found)
    part.scored, part.answered = (set(of.nonzero()[:, 0].tolist()) for of in found)
    part.scores = team.add_tensor(part.table(0))  # of the rows of others there are zeros
    if answers:
        mine = {i: part.texts[i] for i in own[1]}
        for content in team.gather(json.dumps(mine).encode()):
            part.texts |= {int(i): text for i, text in json.loads(content).items()}


def features(
    scorer: Scorer, rows: Sequence[Candidates], stopped: Callable[[], bool], part: Part
) -> Tensor:
    """Return the hidden states of rows, float64 (rows, size); `part` as in :func:`evaluate`.

    Raises:
        Stopped: between two batches, when that was asked for.
    """
    scorer.model.eval()
    for chosen, batch in scorer.features_all(rows, set(part.scored)):
        part.table(batch.shape[1], torch.float64)[chosen] = batch
        part.scored.update(chosen)
        part.num_forwards += 1
        if stopped():
            raise Stopped
    return part.table(0)


def fit(
    method: Method,
    measure: Measure,
    train: Sequence[Candidates],
    *,
    on_dev: Callable[[], Evaluation],
    lead: Callable[[int, int], None],
    steps: int,
    batch_size: int,
    batch_order: str,
    eval_every: int,
    lr_schedule: str,
    warmup_steps: int,
    keep: str,
    seed: int,
    state: State,
    folder: RunFolder,
    recorder: Recorder | None,
    full_save_every: int,
    loggers: Sequence[Logger],
    log_standing: Callable[[], tuple[int, str]],
    console: Console,
    memory: PeakMemory,
    watch: Watch,
    stopped: Callable[[], bool],
) -> None:
    """Train from ``state.step`` to ``steps``; then ``state.best_step`` names the best weights.

    Dev is looked at (and everything saved) every ``eval_every`` steps and after the last; a run may
    end earlier, at a look after which ``watch`` says why. ``on_dev`` is what the present weights
    make of dev; ``lead`` is told of each step that is computed, and of that with the next look, for
    the ranks that take it too. The best look is that with the lowest dev loss, or where the
    objective is "accuracy" or "f1" with the highest (of equals the lowest loss).
    With ``keep="last"`` the last weights count as the best, with "all" those of every look are
    kept.

    With a recorder a step that it holds is applied, not computed, and the figures are those that it
    holds; weights are then saved every ``full_save_every`` steps, for the others follow from it.

    Raises:
        Stopped: asked to; the state is saved and the same call goes on from there.
        NonFiniteLoss: the weights are those before that step, the checkpoint that of the last look.
        NonFiniteScore: of a row of dev, at the present weights; the checkpoint likewise.
    """
    batches = Batches(train, batch_size, seed, batch_order)
    objective, scorer = measure.objective, measure.scorer

    if recorder is None and not 0 < state.step == state.looked:
        # Weights that a stop between two looks has left: no other run has them (keep=all).
        state.files.pop(folder.weights_path(state.step).name, None)

    def save() -> None:
        state.method, tensors = method.snapshot()
        state.peak_memory_bytes = max(state.peak_memory_bytes, memory.read())
        state.metrics_bytes, state.metrics_sha256 = log_standing()
        if recorder is not None:
            recorder.sync()
        if recorder is None or full_due():
            folder.save(state, method.trained, tensors, keep)
        else:
            if method.keeps_state and state.best_step == state.step:
                # To make them again would take the state of a step before, which nobody keeps.
                folder.save_weights(state, state.step, method.trained, state.method)
            folder.settle(state, keep)

    def full_due() -> bool:
        looked = keep == "all" and state.looked == state.step
        return state.step > 0 and (looked or state.step % full_save_every == 0)

    def is_look(step: int) -> bool:
        return step % eval_every == 0 or step == steps

    def log(record: Mapping[str, Any]) -> None:
        for logger in loggers:
            logger.log(record)

    note = ""
    with console.bar("train", steps, state.step) as bar:
        while True:
            if state.looked < state.step and is_look(state.step):
                try:
                    found = on_dev()
                except Stopped:
                    save()
                    raise
                look = found.figures()
                state.notes["final_share"] = share = method.active_share()
                lowest, highest = map(state.notes.get, ("lowest_loss", "highest_metric"))
                metric = None if objective == "loss" else look[objective]
                is_best = lowest is None or look["loss"] < lowest
                if metric is not None and highest is not None and metric != highest:
                    is_best = metric > highest
                if is_best:
                    state.notes["lowest_loss"] = look["loss"]
                    if metric is not None:
                        state.notes["highest_metric"] = metric
                if is_best or keep == "last":
                    state.best_step, state.best_loss = state.step, look["loss"]
                    state.notes["best_look"] = look
                    folder.save_scores(folder.scores_so_far() | {"dev": found.scores})
                state.looked = state.step
                log(
                    {"step": state.step}
                    | {f"dev.{k}": v for k, v in look.items() if k not in ("standard_error", "n")}
                    | {"active_share": share}
                    | watch.look(look["loss"], is_best)
                )
                save()
                note = f"dev {look[found.metric]:.3f}"
                console.say(
                    f"  step {state.step:>6}  dev {found.metric} {look[found.metric]:.4f}  "
                    f"dev loss {look['loss']:.4f}  active share {share:.3f}"
                    + ("  (best)" if is_best else "")
                )
            elif recorder is not None and full_due() and state.step not in state.weights():
                save()
            if state.step == steps or watch.why is not None:
                return
            if stopped():
                save()
                raise Stopped

            watch.before_step(is_look(state.step + 1))
            made = None if recorder is None else recorder.apply(state.step)
            if made is not None and recorder is not None:
                record = recorder.method.record(made.loss, made.projected_grad)
                seconds = made.seconds
            else:
                batch = [train[i] for i in batches(state.step)]
                method.set_lr_factor(lr_factor(lr_schedule, state.step, steps, warmup_steps))
                scorer.model.train(method.mode == "train")
                start = time.perf_counter()
                lead(state.step, min(steps, (state.step // eval_every + 1) * eval_every))
                record = measure.step(method, batch)
                seconds = seconds_between(start, time.perf_counter())
                if recorder is not None:
                    seconds = recorder.append(state.step, record, seconds)

            state.step += 1
            state.train_seconds += seconds
            state.num_forwards += record.num_forwards
            log(
                {
                    "step": state.step,
                    "loss": record.loss,
                    "projected_grad": list(record.projected_grad),
                    **({"clipped": record.clipped} if record.clipped else {}),
                    **({"unmoved": record.unmoved} if record.unmoved else {}),
                    "seconds": seconds,
                }
            )
            if line := watch.after_step(state.step, record):
                console.say(line)
            bar.step(1, f"loss {record.loss:.4f}  {note}")

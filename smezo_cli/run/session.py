"""Make one run: its stages in order."""

import contextlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from smezo_cli.config.describe import command, recipes, replaced
from smezo_cli.config.digest import digest, is_extensible
from smezo_cli.config.fixed import is_frozen, plain
from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError, redacted_tree
from smezo_cli.files import bounded, strict_json
from smezo_cli.kinds import METRICS
from smezo_cli.machine import torchrun
from smezo_cli.machine.device import all_devices, choose_device
from smezo_cli.run.resume import _damaged, check_done

if TYPE_CHECKING:
    from torch import Tensor

    from smezo_cli.methods.base import Method
    from smezo_cli.methods.frozen import InContext, LinearProbe
    from smezo_cli.run.console import Console
    from smezo_cli.run.loggers import Loggers
    from smezo_cli.run.numerics import Numerics
    from smezo_cli.run.ranks import Ranks
    from smezo_cli.run.watch import Watch
    from smezo_cli.scoring.candidates import Candidates
    from smezo_cli.scoring.evaluation import Evaluation
    from smezo_cli.store.folder import RunFolder
    from smezo_cli.store.partial_scores import Part
    from smezo_cli.store.trajectory import Recorder, Trajectory


_LOOKED_AT = 64  # training rows, for two that are short enough for the self-check


def _run(cfg: DictConfig, settings: Settings, team: "Ranks | None") -> dict[str, Any]:
    device_name = choose_device(
        settings.device, settings.model["device_map"], torchrun.local_rank()
    )
    # What follows imports torch, which takes seconds: every cheap check lies above.
    from smezo_cli.machine.stop import Stopped, StopRequest
    from smezo_cli.run.console import Console
    from smezo_cli.store.folder import UNSETTLED, RunFolder

    path = Path(settings.runs_dir) / settings.name / _run_name(cfg, settings)
    folder = RunFolder(path)
    console = Console()

    def finish(result: dict[str, Any] | None = None) -> dict[str, Any]:
        """Do what is left of the run, or with its result what is left behind that."""
        console.keep(path / "console.log", folder.check_mine)
        with StopRequest(console.say, patient=False) as stop:
            try:
                left = _Run(cfg, settings, folder, console, stop, device_name, team)
                return left.finish() if result is None else left.settle(result)
            except Stopped:
                words = [w for w in shlex.split(command()) if not w.startswith("if_exists=")]
                console.say(f"stopped; the same command goes on from here:\n  {shlex.join(words)}")
                raise KeyboardInterrupt from None

    try:
        done = folder.result()
        if settings.if_exists == "fresh":
            folder.clear()
        elif done is not None and settings.if_exists == "error":
            raise UserError(
                f"{path} exists already; add if_exists=resume or if_exists=fresh, or name=NAME."
            )
        elif (state := folder.load_state()) is not None and state.step > settings.steps:
            raise UserError(
                f"steps={settings.steps}: {path} has done {state.step} steps already; a shorter "
                "run needs a name of its own: add name=NAME."
            )
        elif done is not None and done.get("status") == "done" and done["steps"] == settings.steps:
            check_done(done, settings, path)
            if damaged := _damaged(folder, done["step"]):
                console.say(f"{path}: done, but {' and '.join(damaged)} damaged: mended")
                return finish()
            if not _has_config(folder, cfg):
                _write_config(folder, cfg)
            if state is not None and UNSETTLED in state.notes:
                finish(done)
            metric = done.get("metric", "accuracy")
            console.say(
                f"{path}: done already, test {metric} {done['test'][metric]:.4f} "
                "(if_exists=fresh repeats it)"
            )
            return done
        elif done is not None and done.get("status") == "done":
            # What it goes on from was a result; the longer run may never end.
            folder.write_result(done, f"result-{done['steps']}.json")
        return finish()
    finally:
        console.close()
        folder.close()


class _Run:
    """The stages of a run, each of them skipped where a checkpoint says that it is done."""

    def __init__(
        self,
        cfg: DictConfig,
        settings: Settings,
        folder: "RunFolder",
        console: "Console",
        stop: Any,
        device_name: str,
        team: "Ranks | None",
    ) -> None:
        import torch

        from smezo_cli.machine import memory
        from smezo_cli.store import folder as runs
        from smezo_cli.store import versions

        self.settings, self.folder, self.console, self.stop = settings, folder, console, stop
        self._cfg = cfg
        self.config, self.team, self._as_it_came = plain(cfg), team, False
        self._rank_peaks: list[int] | None = None
        self._rank_sizes: list[int | None] | None = None
        self._has_looked = False
        self._handed_out = False  # followers have the tested weights, whatever they made before
        self._world_size = 1 if team is None else team.size
        self._split = ""  # that was evaluated last
        self.objective: str = settings.method.get("objective", "loss")
        self.recipes = recipes()
        self.device = torch.device(device_name)
        device_map = settings.model["device_map"]
        devices = [device_name] if device_map is None else all_devices(device_map)
        self.memory = memory.PeakMemory(*map(torch.device, devices))
        self.started = versions.now()
        _write_config(folder, cfg)
        self.state = folder.load_state() or runs.State()
        self.resumed = self.state.step > 0
        self.versions = versions.versions()
        self.backend: str | None = None
        self.loggers: Loggers | None = None
        self.recorder: Recorder | None = None
        self.keeps_state = False  # of the method
        self.untrained: dict[str, Evaluation] = {}  # of this process: dev and test, zero-shot
        self.train: list[Candidates]
        self.dev: list[Candidates]
        self.test: list[Candidates]

    def finish(self) -> dict[str, Any]:
        """Do what is left."""
        import torch

        from smezo_cli.machine.stop import Stopped
        from smezo_cli.run.loaded import Loaded
        from smezo_cli.store.folder import UNSETTLED
        from smezo_cli.store.partial_scores import NAME, PartialScores
        from smezo_cli.zo.step import NonFiniteLoss
        from smezo_cli.zo.turns import NotInLockstep

        self._announce()
        self.state.notes.pop(UNSETTLED, None)  # of a run that now goes on
        self.folder.write_result(self._result("running"))
        try:
            if self.team is not None:
                self.team.asked = lambda: self.stop.asked
                self.stop.patient = True  # an exchange that is broken off leaves the others in it
                self.team.start()
            self.loaded = Loaded(self.settings, str(self.device), self.console.say)
            self.versions["threads"] = torch.get_num_threads()  # there may be fewer now
            self.partial = PartialScores(self.folder.path / NAME, self.loaded.model)
            if self.team is not None:
                self._agree(self.team)
                if self._stopped():
                    raise Stopped
            result = self._frozen() if is_frozen(self.settings.method) else self._trained()
        except NonFiniteLoss as error:
            self._close(self._result("diverged", error=str(error)))
            raise UserError(self._diverged(error)) from error
        except NotInLockstep as error:
            self._close(self._result("failed", error=str(error)))
            raise UserError(f"method: {error}.") from error
        except BaseException as error:
            status = "stopped" if self._stopped() else "failed"
            try:
                self._keep_scores()
            finally:  # whatever becomes of the scores, the run is closed
                self._close(self._result(status, error=f"{type(error).__name__}: {error}"))
            raise
        # A run with a trajectory needs the best weights alone, to go on too; unless its method has
        # tensors of its own, which would be made again from the first step on.
        goes_on = self.recorder is None or self.keeps_state
        goes_on = goes_on and is_extensible(self.settings.lr_schedule)
        # A kill behind the result must not leave what is to go: the next start reads it here.
        self.state.notes[UNSETTLED] = {"goes_on": goes_on}
        self.folder.save_state(self.state)
        self._close(result)
        self._settle(result)
        self._summary(result)
        return result

    def settle(self, result: dict[str, Any]) -> dict[str, Any]:
        """Do what a run that was killed right behind its result has not done any more."""
        self._open_loggers().close(result, self.console.say)
        self._settle(result)
        return result

    def _settle(self, result: Mapping[str, Any]) -> None:
        """Remove what a finished run does not need of its checkpoint, and its partial scores."""
        from smezo_cli.store.folder import UNSETTLED
        from smezo_cli.store.partial_scores import NAME

        notes, path = self.state.notes, self.folder.path
        for left in (path / NAME, path / f".{NAME}.partial"):
            left.unlink(missing_ok=True)
        self.folder.settle(self.state, result["keep"], notes[UNSETTLED]["goes_on"])
        del notes[UNSETTLED]  # only now: all that is not named is gone
        self.folder.save_state(self.state)

    def _trained(self) -> dict[str, Any]:
        """The result of a method that takes steps."""
        from smezo_cli.machine import allocator
        from smezo_cli.run.batches import Batches
        from smezo_cli.run.loop import Checkpoint, Reporter, fit
        from smezo_cli.run.numerics import Numerics

        self._check_data()
        method = self._build_method()
        checked = self._self_check(method)  # before the scoring takes its time
        allocator.give_back()
        numerics = Numerics(method, self.settings.seed, self.state.notes)  # of the base model
        self.stop.patient = True  # from here on there is a state to save
        self._choose_batching()
        self._as_it_came = True  # followers hear it
        with self.loaded.as_it_came():
            self._zero_shot()
        self._as_it_came = False
        self._restore(method)
        self._teach()
        allocator.give_back()  # what reading and encoding the data has freed
        if checked is None:
            self._self_check(method, self.train)
        self._prepare(method)
        allocator.give_back()
        self._open_loggers()
        s = self.settings
        bar = self.console.bar("train", s.steps, self.state.step)
        watch, loggers = self._watch(numerics), self.loggers
        assert loggers is not None
        fit(
            method,
            Batches(self.train, s.batch_size, s.seed, s.batch_order),
            self.measure,
            lambda: self._look(method),
            Checkpoint(
                self.state, self.folder, self.recorder, self.memory, s.keep, s.full_save_every
            ),
            Reporter(loggers, self.console, bar, watch),
            s,
            self._stopped,
        )
        if watch.why is not None and self.state.step < self.settings.steps:
            early = {"step": self.state.step, "why": watch.why}
            self.state.notes["stopped_early"] = early
            self.console.say(f"  ended early at step {self.state.step}: {watch.why}")
        result = self._test(method)
        result["numerics"] |= self._loss_noise(method)
        return result

    def _frozen(self) -> dict[str, Any]:
        """The result of a method that takes no steps: what it asks the model, on dev and test."""
        from smezo_cli.methods.frozen import InContext, LinearProbe
        from smezo_cli.run.method import build_frozen

        self._check_data()
        method = build_frozen(self.loaded)
        self.stop.patient = True
        self._choose_batching()
        self._zero_shot()
        found = self.untrained
        if isinstance(method, InContext):
            found = {}
            self._demonstrate(method)
        elif isinstance(method, LinearProbe):
            found = {}
            self._probe(method)
        dev = found.get("dev") or self._evaluate(self.dev, "dev")
        test = found.get("test") or self._evaluate(self.test, "test")
        look = dev.figures()
        state = self.state
        state.best_step, state.best_loss, state.notes["best_look"] = 0, look["loss"], look
        state.metrics_bytes = 0  # of the one record, which a start before this may have written
        loggers = self._open_loggers()
        figures = {k: v for k, v in look.items() if k not in ("standard_error", "n")}
        loggers.log({"step": 0} | {f"dev.{k}": v for k, v in figures.items()})
        state.metrics_bytes, state.metrics_sha256 = loggers.standing()
        self.console.say(f"  dev {dev.metric} {look[dev.metric]:.4f}  dev loss {look['loss']:.4f}")
        return self._report(test, dev.scores)

    def _probe(self, method: "LinearProbe") -> None:
        """Score by a probe from here on: that of the state, or one fitted on the train rows."""
        import time

        import torch

        from smezo_cli.run.evaluate import features
        from smezo_cli.store.saved import tensors_digest

        state, folder, scorer = self.state, self.folder, self.loaded.scorer
        if 0 in state.weights():
            self.loaded.set_probe(folder.load_weights(state, 0), folder.path)
            return
        start = time.perf_counter()
        self.console.say(f"  hidden states of {len(self.train)} training rows, then the fit")
        part, self._split = self._part(self.train, "train"), ""
        states = features(scorer, self.train, self._stopped, part)
        self.stop.patient = False  # nothing of a fit is kept before it is there
        labels = torch.tensor([c.label for c in self.train])
        probe = method.fit(states, labels, len(self.train[0].full))
        self.stop.patient = True
        state.train_seconds = time.perf_counter() - start
        state.num_forwards = part.num_forwards
        state.notes["num_trained"] = sum(t.numel() for t in probe.values())
        note = {"step": 0, "sha256": tensors_digest(probe)}
        state.notes["weights"] = {"best": note, "last": note}
        folder.save_weights(state, 0, probe, {})
        folder.save_state(state)
        self.partial.forget()
        scorer.probe = probe

    def _demonstrate(self, method: "InContext") -> None:
        """Put demonstrations before every row: those of the state, or chosen for it."""
        from smezo_cli.scoring.tokens import token_ids

        notes, task = self.state.notes, self.loaded.task
        prompt = self.loaded.prompts[notes["prompt"]]
        is_new = "demonstrations" not in notes
        if is_new:
            limit = self.loaded.max_length
            if task.kind == "generation":
                limit -= self.settings.task["max_new_tokens"]
            kept = {c.id for c in self.train}
            rows = [row for row in task.train if row.id in kept]
            notes["demonstrations"] = method.choose(
                [(row.id, prompt.candidates(row)[max(0, row.label)]) for row in rows],
                lambda text: len(token_ids(self.loaded.tokenizer, [text])[0]),
                limit,
                max(c.width for c in (*self.dev, *self.test)),
            )
        note = notes["demonstrations"]
        self.console.say(
            f"  {note['used']} of {note['asked']} demonstrations before every row, "
            f"{note['tokens']} tokens"
        )
        self.loaded.demonstrate(note["text"])
        if is_new:  # behind them a row is computed in another way
            self._choose_batching(again=True)
            self.folder.save_state(self.state)
        self.dev, self.test = (self.loaded.encode(rows, prompt) for rows in (task.dev, task.test))
        self.train = []
        self._count_cut()

    # --- stages -------------------------------------------------------------------------------

    def _announce(self) -> None:
        s = self.settings
        knobs = "".join(
            f" {knob}={value:g}"
            for knob in ("lr", "eps", "sparsity")
            if (value := getattr(s, knob)) is not None
        )
        objective = "" if self.objective == "loss" else f" objective={self.objective}"
        length = "" if is_frozen(s.method) else f"steps={s.steps} batch_size={s.batch_size} "
        self.console.say(
            f"{s.task['name']} | {s.model['name']} | {s.method['name']}{knobs}{objective} | "
            f"{length}seed={s.seed} | {s.dtype} on {self.device}"
        )
        self.console.say(f"  folder  {self.folder.path}")
        if s.model.get("trust_remote_code"):
            self.console.say("  remote code  Python files of the model are executed, as asked")
        if self.recipes:
            self.console.say(f"  recipe  {' and '.join(self.recipes)}")
        for line in replaced():
            self.console.say(f"  file    {line}")
        if self.resumed:
            self.console.say(f"  going on from step {self.state.step}")

    def _choose_batching(self, again: bool = False) -> None:
        """Decide by measuring which rows share a forward; a run that goes on keeps to it.

        Args:
            again: measure once more, and keep apart what either measurement does.
        """
        from smezo_cli.scoring.batching import Found

        notes, loaded = self.state.notes, self.loaded
        found = Found.of(notes["batching"]) if "batching" in notes else Found()
        if again or "batching" not in notes:
            prompts = [loaded.prompts[notes["prompt"]]] if "prompt" in notes else loaded.prompts
            found = found.stricter(loaded.measure_batching(prompts))
            notes["batching"] = found.plain()
        found.to(loaded.scorer)
        if self.team is not None:
            self.team.tell("batching", found=found.plain())
        if found.line:
            self.console.say(found.line)

    def _build_method(self) -> "Method":
        """The method, and a line on its passes."""
        from smezo_cli.run.measure import Measure
        from smezo_cli.run.method import build_method

        method = self.method = build_method(self.loaded)
        size = self.settings.micro_batch_size
        if size is None and (size := self.state.notes.get("micro_batch_size")) is not None:
            self.console.say(f"  micro_batch_size={size}, as the memory was too small for more")
        self.measure = Measure(
            self.loaded.scorer, self.objective, size, self.team, self._halved, self._lead
        )
        self.keeps_state = method.keeps_state
        passes = getattr(method, "passes", None)
        if passes is not None:
            self.backend = passes.name
            why = getattr(method, "why_eager", "")
            hint = f" ({why}; fused passes would be faster, with the same numbers)"
            self.console.say(f"  passes  {passes.name}{hint if why else ''}")
        return method

    def _halved(self, line: str, size: int) -> None:
        """The memory was too small for more rows at once: the run goes on so when resumed, too."""
        self.console.say(line)
        self.state.notes["micro_batch_size"] = size

    def _zero_shot(self) -> None:
        """The model as it comes: choose the prompt and fit label offsets on dev, score the test."""
        notes, task = self.state.notes, self.loaded.task
        if "prompt" not in notes:
            frozen = is_frozen(self.settings.method)
            if self.settings.zero_shot:
                self.console.say("zero-shot:" if frozen else "zero-shot, before training:")
            self._choose_prompt()
            if len(self.loaded.prompts) > 1:
                self.console.say(
                    f"  chosen on dev: {self.loaded.prompts[notes['prompt']].template!r}"
                )
        self.train, self.dev, self.test = (
            self.loaded.encode(rows, self.loaded.prompts[notes["prompt"]])
            for rows in (task.train, task.dev, task.test)
        )
        self._leave_out_long()
        self._count_cut()
        scores = self.folder.load_scores()
        of_rows = [rows for name, rows in scores.items() if name.startswith("outcome.")]
        fits = all(rows.shape == (len(self.test),) for rows in of_rows)
        fits = fits and "outcome.zero_shot" in scores
        if self.settings.zero_shot and (not fits or "zero_shot" not in notes):
            found = self.untrained["test"] = self._evaluate(self.test, "test")
            scores = {"zero_shot": found.scores, "outcome.zero_shot": found.per_row()}
            notes["zero_shot"] = found.figures()
            self._say_test(notes["zero_shot"][found.metric], notes["zero_shot"], "")
            offsets = self._offsets()
            if offsets is not None:
                notes["zero_shot_calibrated"] = found.figures(offsets)
                scores["outcome.calibrated"] = found.per_row(offsets)
                figures = notes["zero_shot_calibrated"]
                self._say_test(figures[found.metric], figures, ", calibrated on dev")
            self.folder.save_scores(scores | {"labels": found.labels})
            self.folder.save_state(self.state)
        if self.settings.stop_if_diverged is not None and "dev_loss_before" not in notes:
            note = notes["prompts"][notes["prompt"]]
            before = note.get("dev") or self._evaluate(self.dev, "dev").figures()
            notes["dev_loss_before"] = before["loss"]
            self.folder.save_state(self.state)
        self.partial.forget()

    def _choose_prompt(self) -> None:
        """The prompt with the best dev figure, of classification with a threshold fitted there."""
        from smezo_cli.scoring import metrics
        from smezo_cli.tasks.base import one_class

        notes, task = self.state.notes, self.loaded.task
        tried: list[tuple[float, float, int]] = []
        for k, prompt in enumerate(self.loaded.prompts):
            note: dict[str, Any] = {
                **{"template": prompt.template, "labels": list(prompt.labels)},
                "option": prompt.option,
                **({} if prompt.sfc is None else {"sfc": prompt.sfc}),
            }
            calibrates = self.settings.zero_shot and task.kind == "classification"
            if len(self.loaded.prompts) > 1 or calibrates:
                found = self._evaluate(self.loaded.encode(task.dev, prompt), "dev", k)
                note["dev"] = best = found.figures()
                line = f"  dev {best[found.metric]:.4f}"
                # Of one class alone any offset that favours it is right in all rows.
                if task.kind == "classification" and not one_class(found.labels.tolist()):
                    offsets = metrics.fit_offsets(found.scores, found.labels)
                    note |= {"dev_calibrated": found.figures(offsets), "offsets": offsets.tolist()}
                    best = note["dev_calibrated"]
                    line += f", calibrated {best[found.metric]:.4f}"
                tried.append((best[found.metric], -best["loss"], k))
                if max(tried, key=lambda t: t[:2])[2] == k:
                    self.untrained["dev"] = found
                words = f" {'/'.join(prompt.labels)}" if prompt.labels else ""
                self.console.say(f"{line}  {prompt.template!r}{words}")
            notes.setdefault("prompts", []).append(note)
        notes["prompt"] = max(tried, key=lambda t: t[:2])[2] if tried else 0

    def _offsets(self) -> "Tensor | None":
        """Added to the label scores before training; None where there are no labels."""
        import torch

        note = self.state.notes["prompts"][self.state.notes["prompt"]]
        return torch.tensor(note["offsets"]) if "offsets" in note else None

    def _check_data(self) -> None:
        """A run goes on only with the rows that it began with."""
        from smezo_cli.tasks.base import fingerprint

        notes = self.state.notes
        # Other ranks have read their rows already.
        alone = self.team is None
        if changed := self.loaded.differing_rows(notes.get("rows", {}), may_renumber=alone):
            raise UserError(
                f"the {' and '.join(changed)} rows are not those that {self.folder.path} began "
                "with: put the data back, or start over with if_exists=fresh."
            )
        rows = {n: fingerprint(getattr(self.loaded.task, n)) for n in ("train", "dev", "test")}
        model = self.loaded.fingerprint()
        if notes.get("model", model) != model:
            raise UserError(
                f"the model is not the one that {self.folder.path} began with: put its weights "
                "back (or the same revision), or start over with if_exists=fresh."
            )
        prompts = notes.get("prompts", [])
        if "prompt" in notes and (
            len(prompts) != len(self.loaded.prompts)
            or any(
                len(note["labels"]) != len(prompt.labels)
                or len(note.get("offsets", prompt.labels)) != len(prompt.labels)
                for note, prompt in zip(prompts, self.loaded.prompts, strict=True)
            )
        ):
            raise UserError(
                f"the prompts are not those that {self.folder.path} began with; start over with "
                "if_exists=fresh."
            )
        notes |= {"rows": rows, "model": model}

    def _leave_out_long(self) -> None:
        from smezo_cli.run.follower import short_enough

        longest = self.settings.task["max_train_tokens"]
        if longest is None:
            return
        whole, self.train = len(self.train), short_enough(self.train, longest)
        if not self.train:
            raise UserError(
                f"task.max_train_tokens={longest} leaves out all {whole} rows; raise it."
            )
        self.console.say(
            f"  {whole - len(self.train)} of {whole} training rows are longer than "
            f"{longest} tokens and left out"
        )
        if len(self.train) < whole and (note := self._one_class_left()):
            self.console.say(f"  note    {note}")

    def _one_class_left(self) -> str:
        """Say that the training rows that are short enough are of one class alone, or ''."""
        from smezo_cli.tasks.base import one_class

        task = self.loaded.task
        train = self.train if hasattr(self, "train") else []
        if not one_class([c.label for c in train]) or one_class([r.label for r in task.train]):
            return ""
        return (
            f"one class alone in train (the {len(train)} rows that are short enough: label "
            f"{task.classes[train[0].label]}): there is nothing to tell apart"
        )

    def _data_notes(self) -> list[str]:
        """What somebody who reads the figures must know of the rows."""
        if not hasattr(self, "loaded"):
            return []
        found = self._one_class_left()
        return [*self.loaded.task.notes, *([found] if found else [])]

    def _count_cut(self) -> None:
        """Say what of the rows does not reach the model as it was written."""
        rows = [*self.train, *self.dev, *self.test]
        truncated = sum(c.truncated for c in rows)
        self.state.notes["truncated"] = truncated
        if truncated:
            self.console.say(
                f"  {truncated} of {len(rows)} prompts are longer than "
                f"{self.settings.model['max_length']} tokens: cut on the left"
            )
        merged = sum(c.num_merged > 0 for c in rows)
        if merged:
            self.console.say(
                f"  in {merged} of {len(rows)} prompts the tokenizer merges a candidate with its "
                "context: scored from the first token that differs"
            )
        if self.loaded.task.kind == "classification" and not all(c.shares_prefix for c in rows):
            self.console.say("  label words of more than one token: a forward scores one candidate")

    def _say_test(self, score: float, figures: Mapping[str, Any], words: str) -> None:
        self.console.say(f"  test {score:.4f} +- {figures['standard_error']:.4f}{words}")

    def _restore(self, method: "Method") -> None:
        """Weights and method as they were at the state; what of the state is not good is undone."""
        from smezo_cli.run.replay import rebuild, restore
        from smezo_cli.store.trajectory import Recorder, check_length
        from smezo_cli.zo.optimizer import ZeroOrder

        state, folder, say = self.state, self.folder, self.console.say
        if not isinstance(method, ZeroOrder):
            if state.step and (bad := folder.damaged_weights(state)):
                name = self.settings.method["name"]
                say(f"  {' and '.join(bad)} damaged or missing, and {name} has no trajectory:")
                say("  trained again from the first step on")
                state.start_over()
            if state.step:
                if not folder.has_metrics(state):
                    say("  metrics.jsonl is damaged: what it lacks is lost, the training goes on")
                saved = folder.load_weights(state, state.step)
                self.loaded.set_weights(saved, folder.path)
                restore(method, state.method, folder.load_optimizer(state, state.step), folder)
            return
        check_length(self.settings.steps, method.num_queries)
        path = folder.path / "trajectory.bin"
        header = {
            "identity": method.identity(),
            "model": state.notes["model"],
            "config": digest(self.config),
            "rows": state.notes["rows"],
        }
        known = self._known_steps(path, header)
        best = state.best_step or 0
        if self.settings.keep == "best" and folder.nearest(state, best, say) is None:
            # The model itself may be anywhere; of its own the run keeps what it may go back to.
            folder.save_weights(state, 0, method.trained, method.snapshot()[0])
            folder.save_state(state)
        if known is not None:
            rebuild(self.loaded, method, folder, state, known, state.step, say, goes_on=True)
        self.recorder = Recorder(path, header, method, known, self._lost)

    def _known_steps(self, path: Path, header: Mapping[str, Any]) -> "Trajectory | None":
        """The recorded steps that are good; the state is put back where it says more than they."""
        from smezo_cli.store.trajectory import Damaged, differences, read

        state, say, known = self.state, self.console.say, None
        if path.exists():
            try:
                known = read(path)
            except Damaged as error:
                say(f"  {error}")
        count = 0 if known is None else len(known)
        if known is not None and (other := differences(known.header, header)):
            raise UserError(
                f"{path} was written with another {' and '.join(other)}: put that back, or start "
                "over with if_exists=fresh."
            )
        if known is not None and known.damage:
            say(f"  trajectory.bin: {known.damage}")
        if count < state.step:
            say(f"  the {state.step - count} steps from step {count} on are trained again")
            state.start_over()
        elif not self.folder.has_metrics(state):
            say("  metrics.jsonl is damaged: it is written anew")
            state.start_over()
        elif self.settings.keep == "all" and (bad := self.folder.damaged_weights(state)):
            say(f"  {' and '.join(bad)} damaged or missing: every look is saved anew")
            state.start_over()
        if count > state.step:
            say(f"  {count - state.step} steps after step {state.step} are recorded: applied")
        return known

    def _self_check(
        self, method: "Method", rows: "Sequence[Candidates] | None" = None
    ) -> int | None:
        """Refuse what functional probes cannot reach, on two training rows.

        Args:
            method: at any weights of the run.
            rows: to take them from; None encodes a few, before the prompt is chosen.

        Returns:
            How many kinds of parameters were checked; None where losses of the model as it came are
            not finite, which its scores say with the row.
        """
        from smezo_cli.run.follower import short_enough
        from smezo_cli.zo.step import NonFiniteLoss

        scorer, is_first = self.loaded.scorer, rows is None
        if rows is None:
            prompt = self.loaded.prompts[self.state.notes.get("prompt", 0)]
            some = self.loaded.encode(self.loaded.task.train[:_LOOKED_AT], prompt)
            rows = short_enough(some, self.settings.task["max_train_tokens"]) or some
        two = rows[:2]
        scorer.model.eval()
        try:
            checked = method.self_check(lambda: scorer.loss(two))
        except NonFiniteLoss:
            if not is_first:
                raise
            return None
        except ValueError as error:
            raise UserError(self._unreached(error)) from error
        if checked:
            self.console.say(f"  self-check: {checked} kinds of parameters probed exactly")
        return checked

    def _unreached(self, error: ValueError) -> str:
        """The sentence of a self-check that fails, with the words that let the run go."""
        from smezo_cli.zo.self_check import Unreached

        if not isinstance(error, Unreached):
            return f"method: {error}."
        globs = [*self.settings.method["freeze"], *error.globs]
        word = f"method.freeze=[{','.join(json.dumps(glob) for glob in globs)}]"
        return (
            f"method: {error.what}freeze them by {shlex.quote(word)}, or use "
            "method.executor=in_place."
        )

    def _look(self, method: "Method") -> "Evaluation":
        """What the present weights make of dev; the loop saves it at once.

        The first time after steps, two rows of it are checked as those of train were: a model may
        take another path at other rows, or after a while.
        """
        check = getattr(method, "check_reads", None)
        rows = [row for row in self.dev if row.gold >= 0][:2]
        # Of several ranks none may come to compute in a way of its own.
        if check is not None and rows and not self._has_looked and self.team is None:
            self._has_looked = True
            self.loaded.scorer.model.eval()
            try:
                check(lambda: self.loaded.scorer.loss(rows))
            except ValueError as error:
                raise UserError(self._unreached(error)) from error
        found = self._evaluate(self.dev, "dev", step=self.state.step)
        self.partial.forget()
        return found

    def _prepare(self, method: "Method") -> None:
        """Choose the executor, see to the space, record the realised sparsity."""
        from smezo_cli.files.atomic import check_space

        self._choose_executor(method)
        weights = method.trained.values()
        check_space(self.folder.path, 3 * sum(p.numel() * p.element_size() for p in weights))
        if "active_share" not in self.state.notes:
            self.state.notes["active_share"] = method.active_share()
            self.state.notes["num_trained"] = method.num_weights
        share = self.state.notes["active_share"]
        self.console.say(
            f"  trains {method.num_weights / 1e6:.1f} M weights, {share:.4f} of them active"
        )

    def _choose_executor(self, method: "Method") -> None:
        """Let a method that can measure its losses in two ways try both on the next batch.

        A run that goes on asks anew: the numbers are the same, and the machine may be another.
        """
        from smezo_cli.run.batches import Batches

        choose = getattr(method, "choose_executor", None)
        if choose is None:
            return
        s = self.settings
        rows = Batches(self.train, s.batch_size, s.seed, s.batch_order)(self.state.step)
        batch = [self.train[i] for i in rows]
        seconds = self.measure.with_room(choose, batch)
        words = ", ".join(f"{name} {spent:.3g} s" for name, spent in seconds.items())
        chosen: str = method.executor  # type: ignore[attr-defined]  # there, where choose_executor is
        self.state.notes["executor"] = chosen
        if seconds:
            self.console.say(f"  executor  {chosen} (two forwards: {words})")

    def _watch(self, numerics: "Numerics") -> "Watch":
        from smezo_cli.run.watch import Watch

        s, notes = self.settings, self.state.notes
        return Watch(
            notes,
            numerics,
            stop_if_diverged=s.stop_if_diverged,
            patience=s.patience,
            reference=notes.get("dev_loss_before"),
            objective=self.objective,
        )

    def _loss_noise(self, method: "Method") -> dict[str, Any]:
        """What low precision does to the losses of a run that is in it; at the tested weights."""
        from smezo_cli.run.batches import Batches
        from smezo_cli.run.numerics import loss_noise
        from smezo_cli.zo.optimizer import ZeroOrder
        from smezo_cli.zo.step import NonFiniteLoss

        s = self.settings
        dtypes = {s.dtype, s.compute_dtype or s.dtype}
        if dtypes == {"float32"} or not isinstance(method, ZeroOrder):
            return {}
        rows = Batches(self.train, s.batch_size, s.seed, s.batch_order)(self.state.step)
        try:
            batch = [self.train[i] for i in rows][: self.measure.size]
            return loss_noise(method, self.loaded.scorer, batch, self.objective, self._check_stop)
        except (RuntimeError, MemoryError, NonFiniteLoss) as error:  # the run has its result
            line = str(error).partition("\n")[0]
            self.console.say(f"  the loss noise of {s.dtype} was not measured: {line}")
            return {}

    def _open_loggers(self) -> "Loggers":
        from smezo_cli.run.loggers import open_loggers

        node, path, kept = self.settings.logger, self.folder.path, self.state.metrics_bytes
        self.loggers = open_loggers(node, path, self.config, kept, self._lost)
        return self.loggers

    def _keep_scores(self) -> None:
        """Keep what evaluations have scored whose results are not saved."""
        if hasattr(self, "partial"):
            # The run ends for another reason, which is told; a device that failed gives nothing.
            with contextlib.suppress(UserError, RuntimeError, MemoryError):
                count = self.partial.keep()
                if count:
                    self.console.say(f"  kept the scores of {count} rows")

    def _part(self, rows: Any, split: str, step: int = 0) -> "Part":
        """What an evaluation that was stopped has left of these rows."""
        from smezo_cli.store.saved import tensors_digest

        probe = self.loaded.scorer.probe
        about = {
            "step": step,
            "as_it_came": self._as_it_came,
            "probe": None if probe is None else tensors_digest(probe),
            "settings": digest(self.config),
            "model": self.state.notes["model"],
            "batching": self.state.notes["batching"],
            "machine": [str(self.device), self.settings.dtype, self.settings.compute_dtype],
        }
        return self.partial.part(about, split, rows)

    def _evaluate(
        self, rows: Any, split: str, prompt: int | None = None, step: int = 0
    ) -> "Evaluation":
        """What the model makes of some rows.

        Args:
            rows: of the split.
            split: their name.
            prompt: under which they are; None: the chosen one.
            step: that the model's weights are of.
        """
        from smezo_cli.run.evaluate import evaluate

        self._split = split
        team, part = self.team, self._part(rows, split, step)
        if team is not None:
            prompt = self.state.notes["prompt"] if prompt is None else prompt
            # Of the base model, and of weights that were handed out, there is nothing to apply.
            is_there = self._as_it_came or self._handed_out
            made = 0 if is_there else getattr(self.method, "num_steps", 0)
            team.evaluate(
                **{"split": split, "prompt": prompt, "as_it_came": self._as_it_came, "step": made},
                **{"scored": sorted(part.scored), "answered": sorted(part.answered)},
            )
        done = len(part.answered if self.loaded.task.kind == "generation" else part.scored)
        if done:
            self.console.say(f"  {split}: {done} of {len(rows)} rows were scored before the stop")
        bar = self.console.bar(split, len(rows), done)
        return evaluate(self.loaded.scorer, rows, bar, self._stopped, team, part)

    def _check_stop(self) -> None:
        from smezo_cli.machine.stop import Stopped

        if self._stopped():
            raise Stopped

    def _stopped(self) -> bool:
        return self.stop.asked or (self.team is not None and self.team.stop_asked)

    # --- other ranks --------------------------------------------------------------------------

    def _agree(self, team: "Ranks") -> None:
        """Have all ranks the same data, model, settings and smezo?"""
        from smezo_cli.run.follower import facts

        team.agree(facts(self.loaded, self.settings))
        self.console.say(
            f"  ranks   {team.size}: {team.of_rows} share the rows"
            + (f", {team.of_queries} the queries" if team.of_queries > 1 else "")
        )

    def _teach(self) -> None:
        """Send the followers the steps that are recorded: their weights follow from them."""
        if self.team is not None and self.recorder is not None:
            known = self.recorder.trajectory()
            columns = known.columns(len(known)).astype("<f8")
            self.team.tell("trajectory", columns.tobytes(), queries=len(columns) - 1)

    def _lead(self, step: int, until: int) -> None:
        if self.team is not None:
            queries: int = self.method.num_queries  # type: ignore[attr-defined]  # a ZeroOrder's
            prompt = self.state.notes["prompt"]
            self.team.take_steps(step, until, queries, prompt=prompt)

    def _dismiss(self, team: "Ranks") -> None:
        """Let the followers go, for what is left is this rank's."""
        found = team.memory()
        self._rank_peaks = [self.memory.read(), *(of["peak"] for of in found)]
        self._rank_sizes = [self._micro_batch_size(), *(of["micro_batch_size"] for of in found)]
        for rank, of in enumerate(found, start=1):
            if of["halved"]:
                size = of["micro_batch_size"]
                self.console.say(
                    f"  rank {rank} was out of memory: it ended with {size} rows at once"
                )
        team.leave()
        self.team = None

    def _have_best(self, team: "Ranks", step: int) -> bool:
        """Have all ranks the weights of a step, the tested one?"""
        if step == self.state.step:
            return True
        path = self.folder.weights_path(step).absolute()
        self._handed_out = True
        return team.hand_out(str(path), self.state.files[path.name])

    def _test(self, method: "Method") -> dict[str, Any]:
        """The best weights on the test rows, beside both zero-shots."""
        if "executor" in self.state.notes:
            self.state.notes["executor"] = getattr(method, "executor", None)
        if self.state.best_step is None:  # dev is looked at after the last step
            raise UserError(
                f"{self.folder.path}/checkpoint/state.json is not what a run leaves: start over "
                "with if_exists=fresh."
            )
        self._put_best(method, self.state.best_step)
        if self.team is not None and not self._have_best(self.team, self.state.best_step):
            self._dismiss(self.team)  # they do not see the folder: they have the last weights alone
        found = self._evaluate(self.test, "test", step=self.state.best_step)
        scores = self.folder.scores_so_far()
        shape = (len(self.dev), *found.scores.shape[1:])
        is_classes = found.kind == "classification"
        if "dev" not in scores or (is_classes and scores["dev"].shape != shape):  # it was damaged
            scores["dev"] = self._evaluate(self.dev, "dev", step=self.state.best_step).scores
        if self.team is not None:
            self._dismiss(self.team)
        return self._report(found, scores["dev"])

    def _report(self, found: "Evaluation", dev_scores: "Tensor") -> dict[str, Any]:
        """The result, from the test rows and the scores of dev; saves scores and predictions."""
        from smezo_cli.files import atomic
        from smezo_cli.scoring import metrics
        from smezo_cli.scoring.evaluation import Evaluation
        from smezo_cli.tasks.base import one_class

        scores = self.folder.scores_so_far() | {"dev": dev_scores}
        scores |= {"labels": found.labels, "test": found.scores, "outcome.test": found.per_row()}
        self.folder.save_scores(scores)
        lines = [strict_json.dumps(line, ensure_ascii=False) + "\n" for line in found.predictions()]
        atomic.write_text(self.folder.path / "predictions-test.jsonl", "".join(lines))
        test = found.figures()
        dev = Evaluation(self.dev, scores["dev"])
        if found.kind == "classification" and not one_class(dev.labels.tolist()):
            offsets = metrics.fit_offsets(dev.scores, dev.labels)
            test["calibrated_accuracy"] = found.figures(offsets)["accuracy"]
        for name, key in (("zero_shot", "zero_shot"), ("calibrated", "zero_shot_calibrated")):
            if f"outcome.{name}" in scores:
                gain, error = metrics.paired_gain(found.per_row(), scores[f"outcome.{name}"])
                test[f"over_{key}"] = {"gain": gain, "standard_error": error}
        return self._result("done", test=test)

    def _put_best(self, method: "Method", best: int) -> None:
        """Have the model hold the best weights, and the folder too; note what they are."""
        from smezo_cli.run.replay import rebuild
        from smezo_cli.store.saved import tensors_digest
        from smezo_cli.zo.optimizer import ZeroOrder

        state, folder = self.state, self.folder
        last = tensors_digest(method.trained)
        if self.recorder is not None and isinstance(method, ZeroOrder):
            records = self.recorder.trajectory()
            rebuild(self.loaded, method, folder, state, records, best, self.console.say)
            if best not in state.weights():
                folder.save_weights(state, best, method.trained, method.snapshot()[0])
        elif best != state.step:
            self.loaded.set_weights(folder.load_weights(state, best), folder.path)
        state.notes["weights"] = {
            "best": {"step": best, "sha256": tensors_digest(method.trained)},
            "last": {"step": state.step, "sha256": last},
        }
        folder.save_state(state)

    def _result(
        self, status: str, *, test: Mapping[str, Any] | None = None, error: str | None = None
    ) -> dict[str, Any]:
        """The content of result.json; settings.py and conf/ say what the settings mean."""
        from smezo_cli.run.watch import spike_report
        from smezo_cli.store import folder as runs
        from smezo_cli.store import versions

        s, state, notes = self.settings, self.state, self.state.notes
        shown = notes.get("demonstrations")
        sparsities = {
            name: None if share is None else 1 - share
            for name, share in (
                ("realised", notes.get("active_share")),
                ("final", notes.get("final_share")),
            )
        }
        return {
            "schema": runs.SCHEMA,
            "status": status,
            "error": error,
            "task": s.task["name"],
            "model": s.model["name"],
            "method": s.method["name"],
            "recipes": self.recipes,
            "test": test,
            "zero_shot": notes.get("zero_shot"),
            "zero_shot_calibrated": notes.get("zero_shot_calibrated"),
            "metric": METRICS[s.task["kind"]],
            "objective": None if is_frozen(s.method) else self.objective,
            "demonstrations": {k: v for k, v in shown.items() if k != "text"} if shown else None,
            "dev": {"best": {"step": state.best_step, **notes.get("best_look", {})}},
            "weights": notes.get("weights"),
            "prompt": notes["prompts"][notes["prompt"]] if "prompt" in notes else None,
            "truncated_prompts": notes.get("truncated"),
            "batching": notes.get("batching"),
            "data_fingerprint": self.loaded.task.fingerprint if hasattr(self, "loaded") else None,
            "data_notes": self._data_notes(),
            "model_fingerprint": notes.get("model"),
            # Of a model from the hub, what its revision stood for.
            "model_commit": self._model_commit(),
            "trust_remote_code": bool(s.model.get("trust_remote_code")),
            "train_rows": notes.get("rows", {}).get("train"),
            "test_rows": notes.get("rows", {}).get("test"),
            "sparsity": {"requested": s.sparsity, **sparsities},
            "num_trained": notes.get("num_trained"),
            # Of a model that also takes images or sound.
            "frozen_unread": (self.loaded.unread or None) if hasattr(self, "loaded") else None,
            "lr": s.lr,
            "lr_schedule": s.lr_schedule,
            "warmup_steps": s.warmup_steps,
            "keep": s.keep,
            "eps": s.eps,
            "batch_size": s.batch_size,
            "batch_order": s.batch_order,
            "micro_batch_size": self._micro_batch_size(),
            "rank": 0,
            "world_size": self._world_size,
            "query_ranks": s.query_ranks,
            "rank_peak_memory_bytes": self._rank_peaks,
            "rank_micro_batch_sizes": self._rank_sizes,
            "steps": s.steps,
            "step": state.step,
            "stopped_early": notes.get("stopped_early"),
            "num_forwards": state.num_forwards,
            "train_seconds": state.train_seconds,
            "watch": spike_report(notes),
            "numerics": dict(notes.get("numerics", {})),
            "peak_memory_bytes": max(state.peak_memory_bytes, self.memory.read()),
            "seed": s.seed,
            "data_seed": s.data_seed,
            "dtype": s.dtype,
            "compute_dtype": s.compute_dtype or s.dtype,
            "device": str(self.device),
            "device_map": self.loaded.device_map if hasattr(self, "loaded") else None,
            "attention": self.loaded.attention if hasattr(self, "loaded") else None,
            "noise": s.method.get("noise"),
            "passes": self.backend,
            "executor": notes.get("executor"),
            "onednn_layers": self._num_onednn(),
            "digest": digest(self.config),
            "started": self.started,
            "ended": None if status == "running" else versions.now(),
            "versions": self.versions,
            "command": command(),
        }

    def _micro_batch_size(self) -> int | None:
        return self.measure.size if hasattr(self, "measure") else self.settings.micro_batch_size

    def _num_onednn(self) -> int | None:
        """Linear layers that computed by oneDNN; where it was wrong on the way, 0."""
        from smezo_cli.models.onednn import num_onednn

        return num_onednn(self.loaded.model) if hasattr(self, "loaded") else None

    def _model_commit(self) -> str | None:
        return (
            getattr(self.loaded.model.config, "_commit_hash", None)
            if hasattr(self, "loaded")
            else None
        )

    def _close(self, result: dict[str, Any]) -> None:
        if self.recorder is not None:
            self.recorder.close()
        with contextlib.ExitStack() as stack:  # all are closed, whatever cannot be written
            if self.loggers is not None:
                stack.callback(self.loggers.close, result, self.console.say)
            self.folder.write_result(result)
            if not _has_config(self.folder, self._cfg):
                _write_config(self.folder, self._cfg)

    def _lost(self, line: str) -> None:
        """Say that a file was taken from the run; it is written only where the folder is ours."""
        self.folder.check_mine()
        self.console.say(line)

    def _diverged(self, error: Exception) -> str:
        from smezo_cli.run.not_finite import spoilt_weight, why_not_finite
        from smezo_cli.scoring.objectives import NonFiniteScore

        best, step = self.state.best_step, self.state.step
        what, is_score = str(error), isinstance(error, NonFiniteScore)
        if is_score and self._split:
            at = f" at step {step}" if step else ""
            what = f"{self._split} loss is not finite{at}: {what}"
        # Of the tested weights the dev scores were finite: it is the row that is another.
        if is_score and (not step or self._split == "test"):
            return f"{what}; {why_not_finite(self.loaded)}."
        if not step and (why := spoilt_weight(self.loaded)):
            return f"{what}; {why}."
        good = (
            f"the last good checkpoint is step {best}"
            if best is not None
            else "no checkpoint was good"
        )
        lr = self.settings.lr
        advice = (
            f"lr={lr:g} is too large here: lower it, e.g. lr={lr / 3:.1g}" if lr else "lower lr"
        )
        if best is None:
            advice += ", or eps, or use dtype=float32"
        return f"{what}; {good} in {self.folder.path}; {advice}."

    def _summary(self, result: Mapping[str, Any]) -> None:
        """The closing lines."""
        from smezo_cli.run.console import duration
        from smezo_cli.run.watch import report_lines

        test, sparsity, metric = result["test"], result["sparsity"], result["metric"]
        frozen = is_frozen(self.settings.method)
        which = "last" if result["keep"] == "last" else f"best dev {self.objective} at"
        which = "no step" if frozen else f"{which} step {result['dev']['best']['step']}"
        lines = [
            f"test {metric} {test[metric]:.4f} +- {test['standard_error']:.4f}"
            f"  (n={test['n']}, {which})"
        ]
        for name in ("zero_shot", "zero_shot_calibrated"):
            if f"over_{name}" in test:
                gain = test[f"over_{name}"]
                lines.append(
                    f"  over {name.replace('_', '-', 1).replace('_', ' '):<22}"
                    f"{result[name][metric]:.4f}  {gain['gain']:+.4f} +- "
                    f"{gain['standard_error']:.4f} (paired)"
                )
        if metric == "f1":
            lines.append(f"  exact match    {test['exact_match']:.4f}")
        if test.get("auc") is not None and (result["zero_shot"] or {}).get("auc") is not None:
            lines.append(f"  ranking (AUC)  {result['zero_shot']['auc']:.4f} -> {test['auc']:.4f}")
        if sparsity["requested"] is not None:
            lines.append(
                f"  sparsity  {sparsity['requested']:g} asked, "
                f"{sparsity['realised']:.4f} realised, "
                f"{sparsity['final']:.4f} at the end"
            )
        lines += report_lines(result["numerics"], result["watch"])
        work = f"{result['num_forwards']} forwards, {duration(result['train_seconds'])} of training"
        lines.append(
            f"  {work if result['num_trained'] else 'nothing trained'}, "
            f"peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB"
        )
        self.console.say("\n".join([*lines, f"  {self.folder.path}/result.json"]))


def _write_config(folder: "RunFolder", cfg: DictConfig) -> None:
    from smezo_cli.files.atomic import write_text

    write_text(folder.path / "config.yaml", _settings_text(cfg))


def _has_config(folder: "RunFolder", cfg: DictConfig) -> bool:
    """Is config.yaml there, and that of such a run?"""
    try:
        found = bounded.load_yaml(folder.path / "config.yaml")
        return digest(found) == digest(redacted_tree(plain(cfg)))
    except (OmegaConfBaseException, UserError):
        return False


def _settings_text(cfg: DictConfig) -> str:
    """config.yaml: the resolved settings, without secrets."""
    return OmegaConf.to_yaml(OmegaConf.create(redacted_tree(plain(cfg))))


def _run_name(cfg: DictConfig, settings: Settings) -> str:
    s = settings
    return f"{s.task['name']}-{s.model['name']}-{s.method['name']}-s{s.seed}-{digest(cfg)}"

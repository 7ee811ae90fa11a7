"""Train by MeZO as its paper says, in pieces that go on from each other.

Steps are those of smezo_cli.bench.textbook: four passes in place, a forward a candidate, all
logits, layers as torch has them. They train the tensors that the settings of our MeZO train, on its
batches.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from race import curve
from race.curve import Mark
from smezo_cli.bench import textbook
from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.models.onednn import as_torch_has_it
from smezo_cli.run.batches import batches_of
from smezo_cli.run.console import Console
from smezo_cli.run.evaluate import evaluate
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.rows import short_enough
from smezo_cli.zo.targets import select


class TextbookRacer:
    """Make steps of textbook MeZO on the rows of a job.

    Args:
        words: of a command line of `smezo train method=mezo`: model, task, its prompt, batch size.
        console: receives lines on the model and the data.
    """

    def __init__(self, words: Sequence[str], console: Console) -> None:
        self.settings = check(compose(["method=mezo", *words]))
        self.loaded = loaded = Loaded(self.settings, "cpu", console.say)
        self._console = console
        prompt = loaded.prompts[self.settings.task["prompt"]]
        self.train = short_enough(loaded.encode(loaded.task.train, prompt), loaded)
        self.dev = loaded.encode(loaded.task.dev, prompt)
        chosen = select(loaded.model, self.settings.method["freeze"], [])
        self._trained = {target.name: target.parameter for target in chosen}
        for name, p in loaded.model.named_parameters():
            p.requires_grad_(name in self._trained)
        self._begin = {name: p.detach().clone() for name, p in self._trained.items()}

    def run(self, folder: Path, *, lr: float, seed: int, steps: int, eval_every: int) -> list[Mark]:
        """Go on to a step, and return the curve up to it.

        Args:
            folder: of this racer, lr and seed; holds weights and curve of the last evaluation.
            lr: step size, constant.
            seed: of noise and batches.
            steps: to be made in all; a multiple of eval_every.
            eval_every: steps between two evaluations of dev.
        """
        folder.mkdir(parents=True, exist_ok=True)
        marks = self._go_on(folder)
        at = marks[-1].step if marks else 0
        method = textbook.Textbook(self.loaded.model, lr=lr, eps=self.settings.eps or 0, seed=seed)
        method.num_steps = at
        batches = batches_of(self.train, self.settings.batch_size, seed, self.settings.batch_order)
        seconds = marks[-1].seconds if marks else 0.0
        while at < steps:
            batch = batches.rows(at)
            self.loaded.model.eval()
            start = time.perf_counter()
            with as_torch_has_it(self.loaded.model):
                method.step(lambda: textbook.loss(self.loaded.model, batch))  # noqa: B023  # at once
            seconds += time.perf_counter() - start
            at += 1
            if at % eval_every == 0:
                marks.append(self._mark(at, seconds))
                self._keep(folder, marks)
                print(f"  textbook lr={lr:g} seed={seed} {marks[-1]}", flush=True)
        return marks

    def _mark(self, step: int, seconds: float) -> Mark:
        bar = self._console.bar("dev", len(self.dev))
        found = evaluate(self.loaded.scorer, self.dev, bar, lambda: False).figures()
        return Mark(step, seconds, found["loss"], found["accuracy"])

    @torch.no_grad()
    def _go_on(self, folder: Path) -> list[Mark]:
        """Put the weights of the last evaluation into the model; return the curve up to it."""
        weights, marks = self._begin, list[Mark]()
        if (kept := folder / "curve.json").is_file():
            marks = curve.read(json.loads(kept.read_text("utf-8"))["marks"])
            weights = load_file(folder / f"weights-{marks[-1].step}.safetensors")
        for name, p in self._trained.items():
            p.copy_(weights[name])
        return marks

    def _keep(self, folder: Path, marks: Sequence[Mark]) -> None:
        """Write weights first, then the curve that names them; drop older weights."""
        tensors: dict[str, Tensor] = {name: p.detach() for name, p in self._trained.items()}
        path = folder / f"weights-{marks[-1].step}.safetensors"
        save_file(tensors, path)
        curve.write(folder / "curve.json", {"marks": list(marks)})
        for old in folder.glob("weights-*.safetensors"):
            if old != path:
                old.unlink()

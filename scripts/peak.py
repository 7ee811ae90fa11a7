#!/usr/bin/env python
"""The peak memory of a whole run, over that of inference on the same batches.

    .venv/bin/python scripts/peak.py [KEY=VALUE ...]        (as for smezo train)

Two processes. One is the run: zero-shot, self-check, thresholds, steps, looks at dev, checkpoints,
test. The other loads the same model and data and computes the losses of the run's batches and the
scores of its dev rows (with every prompt, as the run that chooses one) and test rows, with the
compiler loaded and every page of the weights read, as in a run, and does nothing else.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.words import quoted


def inference(template: str, words: list[str]) -> int:
    """Peak bytes of this process from before the model is loaded."""
    import torch

    from smezo_cli.machine import memory as memory_module
    from smezo_cli.machine.device import choose_device
    from smezo_cli.run.batches import Batches
    from smezo_cli.run.loaded import Loaded
    from smezo_cli.zo.passes.choose import choose_passes
    from smezo_cli.zo.passes.draw import Rule

    settings = check(compose([*map(quoted, words)]))
    device = torch.device(choose_device(settings.device))
    memory = memory_module.PeakMemory(device)
    choose_passes(Rule(), "auto", device)
    job = Loaded(settings, str(device), lambda line: None)
    for weights in job.model.parameters():  # files are mapped: a page counts once it is read
        weights.detach().flatten()[:: 4096 // weights.element_size()].sum()
    longest = settings.task["max_train_tokens"] or settings.model["max_length"]
    rows = [c for c in job.encode(job.task.train, job.prompts[0]) if c.width <= longest]
    batches = Batches(rows, settings.batch_size, settings.seed, settings.batch_order)
    with torch.inference_mode():
        for step in range(settings.steps):
            job.scorer.loss([rows[i] for i in batches(step)])
    (chosen,) = (prompt for prompt in job.prompts if prompt.template == template)
    scored = [(job.task.dev, prompt) for prompt in job.prompts] + [(job.task.test, chosen)]
    for split, prompt in scored:
        for _ in job.scorer.score_all(job.encode(split, prompt)):
            pass
    return memory.read()


def main() -> None:
    """Measure and print."""
    words = sys.argv[1:]
    if words[:1] == ["--inference"]:
        print(inference(words[1], words[2:]))
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "smezo_cli", "train", *words, f"runs_dir={folder}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        (path,) = Path(folder).glob("*/*/result.json")
        result = json.loads(path.read_text(encoding="utf-8"))
    run = result["peak_memory_bytes"]
    command = [sys.executable, __file__, "--inference", result["prompt"]["template"], *words]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    alone = int(output.splitlines()[-1])
    print(f"run {run / 2**20:.0f} MiB, inference {alone / 2**20:.0f} MiB: {run / alone:.3f} x")


if __name__ == "__main__":
    main()

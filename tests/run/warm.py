"""Do once what every run does at its start; processes that are forked from this one need not.

The process that runs are forked from imports this module. It composes settings, builds tiny models
and takes a step with each: then the parser has its tables, Hydra its plugins, and torch and
transformers what they load at the first use. All of that is done by functions of the library, in
one thread: no signal is taken over, no stream replaced, no folder made.
"""

import gc
import os
from pathlib import Path

import torch
import torch.distributed

import smezo_cli.methods.first_order
import smezo_cli.run.session
import smezo_cli.run.start  # noqa: F401 - as the others, what every run imports
from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.methods.sparse_mezo import SparseMeZO
from smezo_cli.models.load import load_model
from smezo_cli.scoring.candidates import encode
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.store.versions import versions
from smezo_cli.tasks import load_task
from tests import quick_hydra
from tests.run.tiny_runs import METHODS, SHORT, SMALL


def warm(method: str) -> None:
    """Compose the settings of a run, load what they name, and take a step."""
    cpu, nowhere = torch.device("cpu"), Path("/nowhere")
    settings = check(compose([*SMALL, *SHORT, *METHODS[method]]))
    task = load_task(settings.task, data_seed=0, cache=nowhere)
    scorer = Scorer(*load_model(settings.model, dtype=torch.float32, device=cpu, cache=nowhere))
    rows = encode(task.train[:4], task.prompts[0], scorer.tokenizer, 256)
    SparseMeZO(scorer.model, lr=1e-3, eps=1e-3).step(lambda: scorer.loss(rows))


os.fsync = lambda file: None  # no test cuts the power, and a tiny run would wait for the disk
torch.set_num_threads(1)  # threads do not survive a fork
quick_hydra.remember()
for _method in ("sparse_mezo", "mezo"):
    warm(_method)
for _method in METHODS:
    compose([*SMALL, *SHORT, *METHODS[_method]])
versions()  # asks git
# A collection in a child would write to every object of this process, and so copy its memory.
gc.collect()
gc.freeze()

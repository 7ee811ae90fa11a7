"""What several test files share."""

import gc
import os
import random
import signal
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests import quick_hydra

# Who starts the tests in the background of a shell lets them ignore SIGINT, and so their children.
signal.signal(signal.SIGINT, signal.default_int_handler)
quick_hydra.remember()

# What is compiled is kept: else each worker rewrites all test files, and each child compiles smezo.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# No test cuts the power. A tiny run syncs some twenty files, and would wait for the disk as long as
# it computes. That files are synced before they take their place is a test of tests/store.
os.fsync = lambda file: None


def _freeze() -> None:
    """Take what is there for no garbage: else each run takes 0.2 s to look at all of it."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    """Do so once everything is imported."""
    _freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Do so after each test: what was loaded or composed in it stays, and each run looks at it."""
    done = yield
    _freeze()
    return done


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed what a test may draw from: else its numbers hang on the tests before it."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed asks for other devices, in 0.4 ms
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def no_service_is_left() -> Iterator[None]:
    """W&B names its service in the environment, where processes of later tests would find it."""
    before = {name: value for name, value in os.environ.items() if name.startswith("WANDB")}
    yield
    if "WANDB_SERVICE" in os.environ and "wandb" in sys.modules:
        sys.modules["wandb"].teardown()
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors are fastest in one thread, by far on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

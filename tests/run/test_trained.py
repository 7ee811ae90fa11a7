"""What opens a trained run says where files are missing, and where none can be written."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from safetensors import SafetensorError

from smezo_cli.cli import evaluate
from smezo_cli.errors import UserError
from smezo_cli.run.trained import save_model, trained
from smezo_cli.store.folder import RunFolder, State
from tests.run.in_process import finished
from tests.run.tiny_runs import METHODS, SMALL

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_disk_that_is_full_for_weights_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").touch()
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    loaded: Any = SimpleNamespace(saved_bytes=1, save=save)
    with pytest.raises(UserError, match=r"^cannot write .*/model: I/O error: No space left"):
        save_model(loaded, tmp_path / "model", OmegaConf.create({}), {}, 0)
    assert list(tmp_path.iterdir()) == []


def test_best_weights_that_are_gone_are_told_without_a_step_that_nobody_asked_for(
    tmp_path: Path,
) -> None:
    node = {"name": "adamw", "_target_": "smezo_cli.methods.first_order.FirstOrder"}
    loaded: Any = SimpleNamespace(settings=SimpleNamespace(method=node))
    folder, state = RunFolder(tmp_path), State(step=6, looked=6, best_step=3)
    state.files["weights-6.safetensors"] = ""
    with pytest.raises(UserError, match=r"does not keep the weights of its best step, 3: start"):
        trained(folder, state, loaded, None, print)
    with pytest.raises(UserError, match=r"^--step 2: .* keeps the weights of step 6; "):
        trained(folder, state, loaded, 2, print)
    folder.close()


def test_a_trajectory_that_ends_before_the_best_step_is_told_likewise(tmp_path: Path) -> None:
    words = [*SMALL, *METHODS["mezo"], "steps=4", "eval_every=4", "batch_size=4", "keep=last"]
    folder = finished(words, tmp_path)
    for path in folder.glob("checkpoint/weights-*"):
        path.unlink()
    content = (folder / "trajectory.bin").read_bytes()
    (folder / "trajectory.bin").write_bytes(content[:-36])
    with pytest.raises(UserError, match=r"holds 3 good steps, and the best is step 4: give"):
        evaluate.main([str(folder)])

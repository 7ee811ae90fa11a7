"""A run says so where its processor multiplies narrow numbers one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from smezo_cli.cli.verbs import main
from smezo_cli.models.onednn import is_slow


class Asked:
    """Stands for torch's operators of oneDNN."""

    def __init__(self, **answers: bool) -> None:
        for name, answer in answers.items():
            setattr(self, f"_is_mkldnn_{name}_supported", lambda answer=answer: answer)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what oneDNN says of the processor; returns the function that does."""

    def has(**answers: bool) -> None:
        monkeypatch.setattr(torch.ops, "mkldnn", Asked(**answers), raising=False)

    return has


def test_a_dtype_is_slow_where_onednn_has_no_instructions_for_it(processor: Any) -> None:
    processor(bf16=False, fp16=True)
    found = [is_slow(d) for d in (torch.float32, torch.bfloat16, torch.float16)]
    assert found == [False, True, False]
    processor()  # a build without oneDNN, of which nothing is known
    assert not is_slow(torch.bfloat16)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dtype=bfloat16"], "bfloat16 is many times as slow as float32 on this processor"),
        (["dtype=float16"], ""),
        (["compute_dtype=bfloat16"], "on this processor: leave compute_dtype out"),
        (["dtype=bfloat16", "compute_dtype=bfloat16"], "on this processor: take dtype=float32"),
        ([], ""),
    ],
    ids=str,
)
def test_a_run_says_so(
    words: list[str],
    says: str,
    processor: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    processor(bf16=False, fp16=True)
    line = ["train", "task=toy", "model=tiny-llama", "method=zero_shot", "device=cpu"]
    small = ["task.num_train=4", "task.num_dev=4", "task.num_test=4", "task.prompt=0"]
    assert main([*line, *small, *words]) == 0
    said = capsys.readouterr()
    assert says in said.out + said.err
    assert ("many times as slow" in said.out + said.err) == bool(says)

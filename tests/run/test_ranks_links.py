"""Ranks as torchrun starts them, and over links that are slow."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.run.processes import forkserver, smezo
from tests.run.rank_groups import RUN
from tests.run.tiny_runs import METHODS, SMALL, result_of, run_folder


def torchrun(words: list[str]) -> int:
    """Be torchrun, in a process that has imported torch."""
    from torch.distributed import run

    run.main(words)
    return 0


def test_torchrun(tmp_path: Path) -> None:
    """As the README has it; the exit code is torchrun's."""
    words = [*METHODS["mezo"], *RUN, "steps=2", "name=t"]
    start = ["--standalone", "--nproc-per-node", "2", "-m", "smezo_cli.train"]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = smezo([*start, *words], tmp_path, env=env, program=torchrun)
    assert ended.code == 0, ended.err
    assert "  ranks   2: 2 share the rows" in ended.out
    assert result_of(run_folder(tmp_path, "t"))["status"] == "done"
    assert torch.distributed.is_available()


def test_a_slow_link_carries_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """1 Mbit/s, 30 ms: the weights of one process, and less than 1 KB of IP packets a step."""
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists() or shutil.which("ip") is None:
        pytest.skip("network namespaces and TUN devices need root on Linux, and iproute2")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    for name in ("OMP_NUM_THREADS", "PYTHONPATH"):
        monkeypatch.setenv(name, "")  # it sets them
    slow_link = importlib.import_module("slow_link")
    forkserver()  # so that it is not started by the script, which imports less
    try:
        slow_link.main(
            ["--delay", "0.03", "--steps", "8", "--json", str(tmp_path / "link.json"), *SMALL[1:]]
        )
    except (OSError, subprocess.CalledProcessError) as error:
        if "Operation not permitted" in f"{error} {capfd.readouterr().err}":
            pytest.skip("this system allows no network namespaces")
        raise
    found = json.loads((tmp_path / "link.json").read_text())
    assert found["same_weights"]
    assert all(32 < count < 1024 for count in found["bytes_per_step"])
    assert found["seconds_per_step"] > 2 * 0.03  # there and back


def test_what_volunteers_would_do_is_computed_from_the_measured_bytes(tmp_path: Path) -> None:
    """With a link that carries ten times the bytes of a step, exchanging takes more of the time."""
    script = ROOT / "scripts" / "volunteers.py"
    shares = []
    for count in (400, 4000):
        (tmp_path / "link.json").write_text(json.dumps({"bytes_per_step": [count, 1]}))
        words = ["--link", "link.json", "--volunteers", "8", "--rows", "16", "--steps", "500"]
        ended = subprocess.run(
            [sys.executable, str(script), *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        line = ended.stdout.splitlines()[-1].split("|")
        assert line[1:3] == [" 16 ", " 8 "]
        shares.append(float(line[5].strip().rstrip("%")))
    assert shares[0] < shares[1]

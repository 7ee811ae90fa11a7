"""Freed memory stays for the next tensors, and goes back when asked."""

import subprocess
import sys

import pytest

from smezo_cli.machine import allocator

PROBE = """
import resource, torch
from smezo_cli.machine import allocator
def faults_of_forty_tensors():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.ones(4_000_000)  # 16 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
{first}
faults_of_forty_tensors()
faults = faults_of_forty_tensors()
held = resident()
allocator.give_back()
print(faults, held - resident())
"""


def run(first: str) -> tuple[int, int]:
    """Page faults of forty large tensors, and bytes that giving back freed."""
    code = PROBE.format(first=first)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    faults, freed = out.stdout.split()
    return int(faults), int(freed)


@pytest.mark.skipif(allocator._library() is None, reason="not the GNU C library")
def test_kept_memory_is_not_paid_for_again_and_can_be_given_back() -> None:
    """A tensor of 16 MB has 3,900 pages (fewer faults where pages are huge)."""
    faults, freed = run("allocator.keep_freed_memory()")
    assert faults < 100
    assert freed > 12e6


def test_without_that_library_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_library", lambda: None)
    allocator.keep_freed_memory()
    allocator.give_back()

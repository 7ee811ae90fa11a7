"""Measure the peak memory of a process and of its devices."""

import contextlib
import gc
import os
import platform
import resource
from pathlib import Path

import torch

from smezo_cli.machine import allocator


class PeakMemory:
    """Measure the peak bytes of this run alone: allocator statistics on CUDA, else resident memory.

    In a process that held another run, resident memory includes the libraries which that one
    loaded; nothing gives them back. So a sweep's jobs have processes of their own (fork.py).

    Args:
        devices: where the model may lie; of several GPUs it is the sum of their peaks.
    """

    def __init__(self, *devices: torch.device) -> None:
        self._devices = devices
        gc.collect()  # a run before this one may have left its tensors in cycles
        if devices[0].type == "cuda":
            torch.cuda.set_device(devices[0])  # which also starts CUDA
            torch.cuda.empty_cache()  # a block kept from before may be larger than what it serves
            for device in devices:
                torch.cuda.reset_peak_memory_stats(device)
        else:
            allocator.give_back()  # what a run before this one has freed
            # Linux keeps the peak of the process; 5 sets it back to the present (see proc(5)).
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def read(self) -> int:
        """Return the peak so far, in bytes."""
        if self._devices[0].type == "cuda":
            return sum(torch.cuda.max_memory_allocated(device) for device in self._devices)
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024


def available_bytes() -> int:
    """Return how much memory may still be taken here without swapping; 0 where it is not known."""
    found = [_available_in_machine()]
    folder = Path("/sys/fs/cgroup")  # a container may be given less
    with contextlib.suppress(OSError, ValueError):
        limit, used = (
            int((folder / f"memory.{of}").read_text("ascii")) for of in ("max", "current")
        )
        found.append(max(0, limit - used))
    return min(found)


def _available_in_machine() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

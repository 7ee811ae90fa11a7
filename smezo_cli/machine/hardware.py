"""Say what a measurement was made on."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device) -> dict[str, Any]:
    """Return what was measured on: processor, its number, memory in bytes, accelerator."""
    found: dict[str, Any] = {"cpu": None, "cpus": os.cpu_count(), "accelerator": None}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                found["cpu"] = line.partition(":")[2].strip()
                break
    with suppress(ValueError, OSError):
        found["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found

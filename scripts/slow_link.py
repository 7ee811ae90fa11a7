"""Two ranks over a slow link: the same weights, bytes and seconds of a step.

    sudo -E python scripts/slow_link.py [--rate 1000000] [--delay 0.1] [--steps 40] [KEY=VALUE ...]

Each rank is a process in a network namespace of its own. What it sends goes through a TUN device to
this script, which lets it out on the other side as a link of `--rate` bit/s and `--delay` seconds
one way would, and counts it (IP packets, headers included). Needs Linux, root and iproute2. Bytes
of a step are those of `--steps` steps less those of a quarter of them, over the rest; its seconds
are the median of the steps of the longer run. The same run by one process with the ranks'
micro-batches must end with the same weights.

All these processes are forked from one that has imported torch and computes nothing.
"""

import argparse
import collections
import ctypes
import fcntl
import json
import multiprocessing
import os
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_TUNSETIFF, _TUN, _NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
_NEWNET = 0x40000000  # CLONE_NEWNET of linux/sched.h
_PROCESSES = multiprocessing.get_context("forkserver")
RUN = ["task=toy", "model=tiny-llama", "method=sparse_mezo", "lr=1e-3", "name=link", "device=cpu"]


class Link:
    """A cable between two network namespaces, with a rate and a delay in each direction."""

    def __init__(self, rate: float, delay: float) -> None:
        self.rate, self.delay = rate, delay
        self.names = [f"smezo-{os.getpid()}-{side}" for side in (0, 1)]
        self.sent = [0, 0]  # bytes, by sender
        self._files: list[int] = []
        self._stopping = False
        for side, name in enumerate(self.names):
            file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            device = f"smz{os.getpid() % 100000}{side}"
            request = struct.pack("16sH", device.encode(), _TUN | _NO_PI)
            fcntl.ioctl(file, _TUNSETIFF, request)
            self._files.append(file)
            _ip("netns", "add", name)
            _ip("link", "set", device, "netns", name)
            _ip("-n", name, "addr", "add", f"10.77.0.{side + 1}/24", "dev", device)
            for one in (device, "lo"):
                _ip("-n", name, "link", "set", one, "up")
        self.devices = [f"smz{os.getpid() % 100000}{side}" for side in (0, 1)]
        self._thread = threading.Thread(target=self._carry)
        self._thread.start()

    def _carry(self) -> None:
        waiting: list[collections.deque[tuple[float, bytes]]] = [collections.deque() for _ in "ab"]
        free = [0.0, 0.0]  # when the last packet has left the sender
        while not self._stopping:
            now = time.monotonic()
            for side in (0, 1):
                while waiting[side] and waiting[side][0][0] <= now:
                    os.write(self._files[1 - side], waiting[side].popleft()[1])
            due = [queue[0][0] - now for queue in waiting if queue]
            ready, _, _ = select.select(self._files, [], [], max(0.0, min([0.05, *due])))
            for file in ready:
                side = self._files.index(file)
                packet = os.read(file, 65536)
                self.sent[side] += len(packet)
                free[side] = max(free[side], time.monotonic()) + 8 * len(packet) / self.rate
                waiting[side].append((free[side] + self.delay, packet))

    def close(self) -> None:
        """Take everything down."""
        self._stopping = True
        self._thread.join()
        for file, name in zip(self._files, self.names, strict=True):
            os.close(file)
            _ip("netns", "del", name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def enter(namespace: str) -> None:
    """Move this process into a network namespace, as `ip netns exec` would."""
    library = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{namespace}", encoding="ascii") as file:
        if library.setns(file.fileno(), _NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), file.name)


def train(words: list[str], folder: Path, env: Mapping[str, str], namespace: str = "") -> None:
    """Do `smezo train WORDS` in a folder, and end this process."""
    if namespace:
        enter(namespace)
    os.chdir(folder)
    os.environ.update(env)
    from smezo_cli import train as command

    sys.exit(command.main(words))


def started(words: list[str], folder: Path, env: Mapping[str, str], namespace: str = "") -> Any:
    """Start :func:`train` in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    process = _PROCESSES.Process(target=train, args=(words, folder, env, namespace))
    process.start()
    return process


def ended(process: Any) -> int:
    """Wait for a process; return its exit code."""
    process.join()
    return int(process.exitcode)


def over(link: Link, words: list[str], folder: Path) -> list[int]:
    """Both ranks to their end; bytes that each sent."""
    before = list(link.sent)
    processes = []
    for rank, name in enumerate(link.names):
        env = {
            **{"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
            **{"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511"},
            "GLOO_SOCKET_IFNAME": link.devices[rank],
        }
        processes.append(started(words, folder / str(rank), env, name))
    if any([ended(process) for process in processes]):
        sys.exit("a rank failed, see above")
    return [now - then for now, then in zip(link.sent, before, strict=True)]


def seconds_of(folder: Path) -> float:
    """The median of the steps of the one run in a folder."""
    (path,) = folder.glob("runs/link/*/metrics.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return statistics.median(record["seconds"] for record in records if "loss" in record)


def result(folder: Path) -> dict:
    """result.json of the one run in a folder."""
    (path,) = folder.glob("runs/link/*/result.json")
    return json.loads(path.read_text())


def main(line: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--rate", type=float, default=1e6)
    parser.add_argument("--delay", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("words", nargs="*")
    asked = parser.parse_args(line)
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        sys.exit("network namespaces and TUN devices need root on Linux")
    words = [*RUN, "batch_size=16", f"eval_every={asked.steps}", *asked.words]
    few = asked.steps // 4
    # What the process that all are forked from begins with.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    _PROCESSES.set_forkserver_preload(
        [
            *("smezo_cli.run.session", "smezo_cli.methods.sparse_mezo", "torch.distributed"),
            "transformers.models.llama.modeling_llama",
        ]
    )
    link = Link(asked.rate, asked.delay)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            short = over(link, [*words, f"steps={few}", f"eval_every={few}"], folder / "short")
            long = over(link, [*words, f"steps={asked.steps}"], folder / "long")
            alone = [*words, f"steps={asked.steps}", "micro_batch_size=8"]
            if ended(started(alone, folder / "one", {})):
                sys.exit("one process failed, see above")
            mine, theirs = (result(folder / place) for place in ("long/0", "one"))
            seconds, alone_seconds = (seconds_of(folder / place) for place in ("long/0", "one"))
    finally:
        link.close()
    steps = asked.steps - few
    found = {
        "rate_bits_per_s": asked.rate,
        "delay_s": asked.delay,
        "steps": steps,
        "bytes_per_step": [(b - a) / steps for a, b in zip(short, long, strict=True)],
        "seconds_per_step": seconds,
        "seconds_per_step_alone": alone_seconds,
        "bytes_of_the_rest": [a - few * (b - a) / steps for a, b in zip(short, long, strict=True)],
        "same_weights": mine["weights"] == theirs["weights"],
    }
    print(json.dumps(found, indent=1))
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    if not found["same_weights"]:
        sys.exit("the weights differ")


if __name__ == "__main__":
    main()

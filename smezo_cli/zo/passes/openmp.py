"""Share the threads that torch computes with on a CPU with loops that are not torch's.

After each operation torch's OpenMP threads wait for the next one by spinning for a while. Threads
of another pool would have to share the processors with them: a pass over the weights between two
layers then takes twice as long as alone.

OpenMP may give fewer threads than torch asks for (OMP_THREAD_LIMIT, OMP_DYNAMIC and others). oneDNN
has then cut its work into more parts than are computed: torch's own products in bfloat16 and those
of :mod:`smezo_cli.models.onednn` hold whatever was in the memory before, and no error is raised.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class OpenMP(NamedTuple):
    """Call the OpenMP runtime that torch was linked with.

    Attributes:
        parallel: (address of a C function, address of its argument, threads, 0): calls the function
            with the argument in so many threads at once, and waits for them. It lets go of the
            interpreter meanwhile.
        thread: C function: the number of the calling thread, from 0.
        threads: C function: how many there are.
        is_dynamic: C function: may the calling thread be given fewer than it asks for? (0: no)
        set_dynamic: C function: let this be so for the calling thread, or not (0).
    """

    parallel: Callable[[int, int, int, int], None]
    thread: Callable[[], int]
    threads: Callable[[], int]
    is_dynamic: Callable[[], int]
    set_dynamic: Callable[[int], None]


@functools.cache
def find() -> OpenMP | None:
    """Return the OpenMP runtime that torch runs in; None where it cannot be told or called.

    GOMP_parallel is what GCC makes of a parallel region; LLVM's and Intel's runtimes have it, too.
    """
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    beside = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*"))
    names = [*map(str, beside), "libgomp.so.1", "libiomp5.so", "libomp.so", "libomp.so.5"]
    loaded = getattr(os, "RTLD_NOLOAD", None)
    if loaded is None:
        return None
    for name in names:
        try:
            library = ctypes.CDLL(name, mode=loaded)  # only one that is there already
            parallel = library.GOMP_parallel
            thread, threads = library.omp_get_thread_num, library.omp_get_num_threads
            is_dynamic, set_dynamic = library.omp_get_dynamic, library.omp_set_dynamic
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        for function in (thread, threads, is_dynamic):
            function.argtypes, function.restype = [], ctypes.c_int
        set_dynamic.argtypes, set_dynamic.restype = [ctypes.c_int], None
        return OpenMP(parallel, thread, threads, is_dynamic, set_dynamic)
    return None


#: environment variables by which OpenMP gives fewer threads than are asked for
_LIMITS = ("OMP_DYNAMIC", "OMP_THREAD_LIMIT", "OMP_MAX_ACTIVE_LEVELS", "KMP_LIBRARY")
_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def given(threads: int) -> int:
    """Return how many threads a parallel region has that asks for so many, here and now.

    Where the runtime cannot be called that is not known: 1 where the environment may limit them.
    """
    runtime = find()
    if threads == 1 or "OpenMP" not in torch.__config__.parallel_info():
        return threads
    if runtime is None:
        return 1 if any(name in os.environ for name in _LIMITS) else threads
    counts: list[int] = []
    region = _REGION(lambda _: counts.append(runtime.threads()))
    address = ctypes.cast(region, ctypes.c_void_p).value
    assert address is not None
    runtime.parallel(address, 0, threads, 0)
    return counts[0]


def may_give_fewer() -> bool:
    """Return whether the calling thread may be given fewer threads than torch asks for."""
    threads, runtime = torch.get_num_threads(), find()
    is_dynamic = threads > 1 and runtime is not None and bool(runtime.is_dynamic())
    return is_dynamic or given(threads) < threads


def give_all() -> None:
    """Forbid OpenMP to choose how many threads it gives the calling thread (OMP_DYNAMIC)."""
    if (runtime := find()) is not None and runtime.is_dynamic():
        runtime.set_dynamic(0)


def settle() -> str:
    """Have the calling thread, and torch in all threads, ask for what OpenMP surely gives.

    A thread that is started later has to call :func:`give_all`.

    Returns:
        A line on what was changed; empty where nothing was.
    """
    if not may_give_fewer():
        return ""
    asked = torch.get_num_threads()
    give_all()
    if (sure := given(asked)) < asked:
        torch.set_num_threads(sure)
    named = " ".join(f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ)
    change = f"{sure}, not {asked}" if sure < asked else f"{asked}, always"
    return (
        f"  threads {change}: {named or 'OpenMP'} may give fewer than are asked for, and oneDNN "
        "then leaves out parts of its products"
    )

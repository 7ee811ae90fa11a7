"""The threads that torch computes with on a CPU, for loops that are not torch's.

After each operation torch's OpenMP threads wait for the next one by spinning for a while. Threads
of another pool would have to share the processors with them: a pass over the weights between two
layers then takes twice as long as alone.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class OpenMP(NamedTuple):
    """The runtime that torch was linked with.

    Attributes:
        parallel: (address of a C function, address of its argument, threads, 0): calls the function
            with the argument in so many threads at once, and waits for them. It lets go of the
            interpreter meanwhile.
        thread: C function: the number of the calling thread, from 0.
        threads: C function: how many there are.
    """

    parallel: Callable[[int, int, int, int], None]
    thread: Callable[[], int]
    threads: Callable[[], int]


@functools.cache
def find() -> OpenMP | None:
    """The OpenMP runtime that torch runs in; None where it cannot be told or called.

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
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        for function in (thread, threads):
            function.argtypes, function.restype = [], ctypes.c_int
        return OpenMP(parallel, thread, threads)
    return None

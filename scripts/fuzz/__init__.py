"""Hostile inputs through smezo's own entries: each gives a result or one sentence, nothing else.

    python scripts/fuzz --cases 20000 --seed 0 --json fuzz.json     all kinds
    python scripts/fuzz --kind gguf --cases 500                     one kind
    python scripts/fuzz --kind gguf --case 17 --seed 0              one case, with its traceback

A case is keyed by seed, kind and number alone, and runs in a forked worker under an alarm and a
memory limit. Its values are drawn from Hypothesis' strategies, on bytes that follow from the key;
another version of Hypothesis may make other cases of them. A finding is: a crash or traceback, a
refusal that is no single sentence, a case that lasts longer than the alarm, a worker that dies, a
file made, changed or removed outside of the folders that the case may write to, an unpickled class,
a network connection.

Another format gets a kind in a few lines: a file beside these, named below, with a function from
`Case` to nothing, under `@kind(share)`, that writes hostile files under `case.folder` and calls
`case.smezo(...)` or `case.call(...)`.
"""

from fuzz import (  # noqa: F401  # each registers its kinds
    benchmarks,
    command_lines,
    deltas,
    gguf_files,
    model_folders,
    results,
    run_folders,
    tables,
    trajectories,
    yaml_files,
)

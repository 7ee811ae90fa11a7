"""Kinds `overrides` and `verbs`: words of the command line."""

import random
import shutil

from fuzz.cases import Case, kind
from fuzz.hostile import spoil_bytes

_KEYS = (
    *("steps", "lr", "eps", "sparsity", "seed", "batch_size", "name", "device", "dtype", "task"),
    *("model", "method", "logger", "hydra", "task.prompt", "task.labels", "task.name", "keep"),
    *("model.name", "model.path", "model.config", "model.config.hidden_size", "model.tiny.seed"),
    *("model.config.num_hidden_layers", "model.config.vocab_size", "model.max_length"),
    *("method.mask", "method.freeze", "method._target_", "method.optimizer", "lr_schedule"),
    *("method.optimizer._target_", "method.num_queries", "logger.tags", "hydra.mode", "recipe"),
    *("hydra/launcher", "hydra.launcher._target_", "hydra.callbacks", "hydra.job.name", "x.y"),
    *("hydra.callbacks.x._target_", "hydra.job_logging", "hydra.searchpath", "hydra.sweeper"),
    *("experiment", "hydra/sweeper", "hydra.verbose", "hydra.output_subdir", "model.trust"),
    *("task@x", "task@_global_", "hydra.job.env_set", "model.revision", "task.num_train"),
)
_WORDS = (
    *("", "null", "1", "-1", "1e999", "nan", "inf", "0x10", "1_000", "true", "{}", "[]", "a b"),
    *("{a: 1}", "[1,2", "'", '"', "\\", "${steps}", "${oc.env:HOME}", "${lr}${lr}", "${.}", "???"),
    *("range(0,3)", "choice(1,2)", "interval(0,1)", "sort(3,1)", "glob(*)", "1,2,3", "a=b", "=="),
    *("${oc.decode:'[1]'}", "${model}", "\x00", "\u202e", "é", "\ud800", "x" * 10_000, "(" * 300),
    *(
        "[" * 300,
        "{" * 300,
        "os.system",
        "smezo_cli.files.atomic.write_text",
        "torch.optim.lr_scheduler.os",
    ),
    *("torch.optim.Adam", "builtins.eval", "../../outside/keep.txt", "mezo", "toy", "joblib"),
    *(
        "smezo_cli.config.compose.shutil.rmtree",
        "9" * 5000,
        "${hydra:runtime.cwd}",
        "${oc.create:{a: 1}}",
    ),
    *("100000000000000000000", "['a','b']", "str(1)", "json_str({})", "extend_list(1)", "@", "*"),
)


_ODD_FLAGS = (
    *("--", "-x", "--cfg", "--info", "-m", "--resolve", "--package=x", "--config-dir=."),
    *("--help", "--hydra-help=1", "-c=job", "-mr"),
)


def override(rng: random.Random) -> str:
    """A word of the command line."""
    match rng.randrange(10):
        case 0:
            word = "".join(
                chr(rng.choice((rng.randrange(32, 127), rng.randrange(1, 0x300))))
                for _ in range(rng.randrange(1, 30))
            )
        case 1:
            word = rng.choice(_WORDS)
        case 2:
            word = rng.choice(_ODD_FLAGS)
        case _:
            word = rng.choice(("", "", "", "+", "++", "~")) + rng.choice(_KEYS)
            word += rng.choice(("=", "=", "=", "=", "", "==", ":=")) + rng.choice(_WORDS)
    if rng.random() < 0.15:
        word = spoil_bytes(rng, word.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
    return word


BASE = ("task=toy", "model=tiny-llama")


@kind(2)
def overrides(case: Case) -> None:
    """Words on the command line, through the real parser; nothing is trained."""
    rng = case.rng
    words = [override(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    # A folder of the user's choice is the user's; settings are shown, and a plan is made of some.
    if rng.random() < 0.2:
        words = [w for w in words if not w.startswith("-")]
        case.smezo("plan", *BASE, *words)
    else:
        case.smezo("train", *BASE, *words, "--cfg", "job")


@kind(0.5)
def verbs(case: Case) -> None:
    """Words for the other verbs."""
    rng = case.rng
    shutil.copytree(case.fixtures / "run", case.folder / "runs" / "a")
    verb = rng.choice(
        ("runs", "eval", "predict", "export", "replay", "ls", "show", "completion", "bench")
    )
    odd = ("--sort", "--mean", "--compare", "--json", "--step", "-1", "--out", "no/out.jsonl", "x")
    words = [rng.choice((*odd, override(rng))) for _ in range(rng.choice((1, 2, 3)))]
    if verb == "bench":
        words = ["task=toy", "model=nothing", *words]
    if verb in ("eval", "predict", "export", "replay"):
        words = ["runs/a", *words]
    if any(word.startswith(("/", "..")) for word in words):
        return
    case.smezo(verb, *words, codes=(0, 1) if verb == "replay" else (0,))

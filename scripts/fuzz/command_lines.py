"""Kinds `overrides` and `verbs`: words of the command line."""

import shutil

from fuzz import product
from fuzz.cases import Case, kind
from fuzz.hostile import MEANT, TEXTS, spoil_text

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
    *MEANT,
    *product.WRITERS,
    *("", "-1", "1e999", "nan", "inf", "0x10", "1_000", "{}", "[]", "a b", "@", "*", "toy", "mezo"),
    *("{a: 1}", "[1,2", "'", '"', "\\", "${lr}${lr}", "${.}", "range(0,3)", "choice(1,2)", "1,2,3"),
    *("interval(0,1)", "sort(3,1)", "glob(*)", "a=b", "==", "${oc.decode:'[1]'}", "${model}"),
    *("x" * 10_000, "(" * 300, "[" * 300, "{" * 300, "9" * 5000, "['a','b']", "str(1)"),
    *("os.system", "torch.optim.lr_scheduler.os", "torch.optim.Adam", "builtins.eval", "joblib"),
    *("100000000000000000000", "json_str({})", "extend_list(1)", "${oc.create:{a: 1}}"),
)
_ODD_FLAGS = (
    *("--", "-x", "--cfg", "--info", "-m", "--resolve", "--package=x", "--config-dir=."),
    *("--help", "--hydra-help=1", "-c=job", "-mr"),
)


def override(case: Case) -> str:
    """A word of the command line."""
    match case.below(10):
        case 0:
            word = case.draw(TEXTS)
        case 1:
            word = case.pick(_WORDS)
        case 2:
            word = case.pick(_ODD_FLAGS)
        case _:
            word = case.pick(("", "", "", "+", "++", "~")) + case.pick(_KEYS)
            word += case.pick(("=", "=", "=", "=", "", "==", ":=")) + case.pick(_WORDS)
    if case.chance(0.15):
        word = spoil_text(case, word)
    return word


BASE = ("task=toy", "model=tiny-llama")


@kind(2)
def overrides(case: Case) -> None:
    """Words on the command line, through the real parser; nothing is trained."""
    words = [override(case) for _ in range(case.pick((1, 1, 1, 2, 3)))]
    # A folder of the user's choice is the user's; settings are shown, and a plan is made of some.
    if case.chance(0.2):
        words = [w for w in words if not w.startswith("-")]
        case.smezo("plan", *BASE, *words)
    else:
        case.smezo("train", *BASE, *words, "--cfg", "job")


@kind(0.5)
def verbs(case: Case) -> None:
    """Words for the other verbs."""
    shutil.copytree(case.fixtures / "run", case.folder / "runs" / "a")
    verb = case.pick(
        ("runs", "eval", "predict", "export", "replay", "ls", "show", "completion", "bench")
    )
    odd = ("--sort", "--mean", "--compare", "--json", "--step", "-1", "--out", "no/out.jsonl", "x")
    words = [case.pick((*odd, override(case))) for _ in range(case.pick((1, 2, 3)))]
    if verb == "bench":
        words = ["task=toy", "model=nothing", *words]
    if verb in ("eval", "predict", "export", "replay"):
        words = ["runs/a", *words]
    if any(word.startswith(("/", "..")) for word in words):
        return
    case.smezo(verb, *words, codes=(0, 1) if verb == "replay" else (0,))

"""Kind `configs`: YAML files of --config-dir."""

from fuzz import product
from fuzz.cases import Case, kind
from fuzz.command_lines import BASE
from fuzz.fixtures import QUICK
from fuzz.hostile import as_yaml, bomb, spoil_bytes, spoil_tree


@kind(2)
def configs(case: Case) -> None:
    """YAML files of --config-dir: a task, a model, a method, an experiment, Hydra's own."""
    import yaml

    group = case.pick(("task", "model", "method", "experiment", "logger", "hydra/launcher"))
    sample = {
        "task": "task/toy.yaml",
        "model": "model/tiny-llama.yaml",
        "method": case.pick(("method/sparse_mezo.yaml", "method/adamw.yaml")),
        "experiment": "experiment/embedded.yaml",
        "logger": "logger/jsonl.yaml",
        "hydra/launcher": "logger/wandb.yaml",
    }[group]
    text = (product.CONF_DIR / sample).read_text(encoding="utf-8")
    tree = yaml.safe_load(text) or {}
    head = "".join(line + "\n" for line in text.splitlines()[:1] if "@package" in line).encode()
    if group == "experiment":
        head = b"# @package _global_\n"
        tree = {
            "steps": 2,
            "hydra": {"mode": "RUN"},
            "defaults": [{"override /model": "tiny-llama"}],
        }
    if group == "hydra/launcher":
        tree = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
    if case.chance(0.75):
        tree = spoil_tree(case, tree)
    written = as_yaml(tree)
    if case.chance(0.4):
        written = spoil_bytes(case, written)
    if case.chance(0.2):
        written += bomb(case)
    file = case.folder / "conf" / group / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_bytes(head + written)
    base = [word for word in BASE if not word.startswith(f"{group}=")]
    words = ["--config-dir", "conf", *base, f"{group}=mine"]
    if case.chance(0.2):
        # Run it, as far as it goes: to the construction of what the file names.
        quick = [w for w in QUICK if not w.startswith(("model=", "method."))]
        case.smezo("train", *words, *quick)
    elif case.chance(0.3):
        case.smezo("train", *words, "--cfg", "all")
    else:
        case.smezo("train", *words, "--cfg", "job", *(["--resolve"] if case.chance(0.5) else []))

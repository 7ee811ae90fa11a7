"""Kind `configs`: YAML files of --config-dir."""

from fuzz.cases import Case, kind
from fuzz.command_lines import BASE
from fuzz.fixtures import QUICK
from fuzz.hostile import as_yaml, bomb, spoil_bytes, spoil_tree


@kind(2)
def configs(case: Case) -> None:
    """YAML files of --config-dir: a task, a model, a method, an experiment, Hydra's own."""
    import yaml

    from smezo_cli.config.fixed import CONF_DIR

    rng = case.rng
    group = rng.choice(("task", "model", "method", "experiment", "logger", "hydra/launcher"))
    sample = {
        "task": "task/toy.yaml",
        "model": "model/tiny-llama.yaml",
        "method": rng.choice(("method/sparse_mezo.yaml", "method/adamw.yaml")),
        "experiment": "experiment/embedded.yaml",
        "logger": "logger/jsonl.yaml",
        "hydra/launcher": "logger/wandb.yaml",
    }[group]
    text = (CONF_DIR / sample).read_text(encoding="utf-8")
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
    if rng.random() < 0.75:
        tree = spoil_tree(rng, tree)
    written = as_yaml(tree)
    if rng.random() < 0.4:
        written = spoil_bytes(rng, written)
    if rng.random() < 0.2:
        written += bomb(rng)
    file = case.folder / "conf" / group / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_bytes(head + written)
    base = [word for word in BASE if not word.startswith(f"{group}=")]
    words = ["--config-dir", "conf", *base, f"{group}=mine"]
    if rng.random() < 0.2:
        # Run it, as far as it goes: to the construction of what the file names.
        quick = [w for w in QUICK if not w.startswith(("model=", "method."))]
        case.smezo("train", *words, *quick)
    elif rng.random() < 0.3:
        case.smezo("train", *words, "--cfg", "all")
    else:
        case.smezo("train", *words, "--cfg", "job", *(["--resolve"] if rng.random() < 0.5 else []))

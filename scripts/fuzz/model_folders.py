"""Kind `model_folders`: saved models."""

import contextlib
import json
import shutil

from fuzz.cases import Case, kind
from fuzz.fixtures import QUICK
from fuzz.hostile import as_json, spoil_bytes, spoil_tree
from fuzz.product import settings_of
from fuzz.run_folders import spoil_safetensors


@kind(2.5)
def model_folders(case: Case) -> None:
    """Saved models: config.json, the tokenizer's files, the header of the weights."""
    rng = case.rng
    folder = case.folder / "m"
    shutil.copytree(case.fixtures / "model", folder)
    for _ in range(rng.choice((1, 1, 2))):
        names = ("config.json", "config.json", "tokenizer.json", "tokenizer_config.json")
        file = folder / rng.choice((*names, "model.safetensors", "generation_config.json"))
        if file.suffix == ".safetensors":
            file.write_bytes(spoil_safetensors(rng, file.read_bytes()))
            continue
        tree = None
        with contextlib.suppress(ValueError):  # where it is spoiled already
            tree = json.loads(file.read_text(encoding="utf-8", errors="replace"))
        if not isinstance(tree, dict):
            continue
        if file.name == "config.json" and rng.random() < 0.5:
            key = rng.choice([k for k, v in tree.items() if isinstance(v, int)])
            tree[key] = rng.choice((0, -1, 1, 7, 10**5, 10**7, 2**31, 2**40, 10**30))
        elif file.name == "config.json" and rng.random() < 0.2:
            tree["model_type"] = rng.choice(
                ("gpt2", "opt", "bert", "t5", "mamba", "clip", "x", "../x")
            )
        elif rng.random() < 0.1:
            tree["auto_map"] = {
                "AutoConfig": "evil.Evil",
                "AutoModelForCausalLM": "evil.Evil",
                "AutoTokenizer": ["evil.Evil", None],
            }
            tree["model_type"] = rng.choice((tree.get("model_type"), "evil"))
            (folder / "evil.py").write_text("open('../outside/keep.txt', 'w').write('evil')\n")
        else:
            tree = spoil_tree(rng, tree)
        written = as_json(tree)
        file.write_bytes(spoil_bytes(rng, written) if rng.random() < 0.15 else written)
    if rng.random() < 0.15:
        (folder / "model.safetensors").unlink()
        name = rng.choice(("pytorch_model.bin", "model.safetensors.index.json"))
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../outside/keep.txt"}}
        pickled = b"\x80\x04cos\nsystem\n."
        listed = as_json(spoil_tree(rng, index))
        (folder / name).write_bytes(pickled if name.endswith("bin") else listed)
    load_model_file(case, "m")


def load_model_file(case: Case, path: str) -> None:
    """Load a model as `smezo train` does; a few that load are trained, too."""
    import torch

    from smezo_cli.models.load import load_model

    node = dict(settings_of("task=toy", "model=own", "model.path=m", "model.max_length=16").model)
    loaded = case.call(
        load_model,
        node | {"path": f"./{path}"},
        dtype=torch.float32,
        device=torch.device("cpu"),
        cache=case.folder / "cache",
    )
    if loaded is not None and case.rng.random() < 0.1:
        case.smezo(
            *("train", "task=toy", *QUICK[1:], "model=own", f"model.path=./{path}"),
            "model.max_length=16",
        )

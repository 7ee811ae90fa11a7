"""Kind `model_folders`: saved models."""

import contextlib
import json
import shutil

from fuzz.cases import Case, kind
from fuzz.fixtures import QUICK, load_cpu, settings_of
from fuzz.hostile import as_json, spoil_bytes, spoil_safetensors, spoil_tree


@kind(2.5)
def model_folders(case: Case) -> None:
    """Saved models: config.json, the tokenizer's files, the header of the weights."""
    folder = case.folder / "m"
    shutil.copytree(case.fixtures / "model", folder)
    for _ in range(case.pick((1, 1, 2))):
        names = ("config.json", "config.json", "tokenizer.json", "tokenizer_config.json")
        file = folder / case.pick((*names, "model.safetensors", "generation_config.json"))
        if file.suffix == ".safetensors":
            file.write_bytes(spoil_safetensors(case, file.read_bytes()))
            continue
        tree = None
        with contextlib.suppress(ValueError):  # where it is spoiled already
            tree = json.loads(file.read_text(encoding="utf-8", errors="replace"))
        if not isinstance(tree, dict):
            continue
        sizes = [key for key, value in tree.items() if isinstance(value, int)]
        if file.name == "config.json" and sizes and case.chance(0.5):
            tree[case.pick(sizes)] = case.pick((0, -1, 1, 7, 10**5, 10**7, 2**31, 2**40, 10**30))
        elif file.name == "config.json" and case.chance(0.2):
            tree["model_type"] = case.pick(
                ("gpt2", "opt", "bert", "t5", "mamba", "clip", "x", "../x")
            )
        elif case.chance(0.1):
            tree["auto_map"] = {
                "AutoConfig": "evil.Evil",
                "AutoModelForCausalLM": "evil.Evil",
                "AutoTokenizer": ["evil.Evil", None],
            }
            tree["model_type"] = case.pick((tree.get("model_type"), "evil"))
            (folder / "evil.py").write_text("open('../outside/keep.txt', 'w').write('evil')\n")
        else:
            tree = spoil_tree(case, tree)
        written = as_json(tree)
        file.write_bytes(spoil_bytes(case, written) if case.chance(0.15) else written)
    if case.chance(0.15):
        (folder / "model.safetensors").unlink()
        name = case.pick(("pytorch_model.bin", "model.safetensors.index.json"))
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../outside/keep.txt"}}
        pickled = b"\x80\x04cos\nsystem\n."
        listed = as_json(spoil_tree(case, index))
        (folder / name).write_bytes(pickled if name.endswith("bin") else listed)
    load_model_file(case, "m")


def load_model_file(case: Case, path: str) -> None:
    """Load a model as `smezo train` does; a few that load are trained, too."""
    words = ("task=toy", "model=own", "model.path=m", "model.max_length=16")
    node = dict(settings_of(*words).model) | {"path": f"./{path}"}
    loaded = case.call(load_cpu, node, case.folder / "cache")
    if loaded is not None and case.chance(0.1):
        case.smezo(
            *("train", "task=toy", *QUICK[1:], "model=own", f"model.path=./{path}"),
            "model.max_length=16",
        )

"""Check an adapter of peft by the source of peft's config classes, without importing it or torch.

So a mistake on the command line is told at once, and the kinds and fields are those of the peft
that is installed.
"""

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smezo_cli.errors import UserError, near
from smezo_cli.zo.ranges import shown

#: kinds of peft that cannot be trained here, with the end of the sentence that says so
REFUSED = {
    "adalora": "moves ranks between layers by their gradients, which smezo does not keep",
    "adamss": "clusters weights by scikit-learn, which does not come with smezo",
    "cartridge": "trains keys and values before the text: choose method=mezo_prefix or prefix",
    "cpt": "moves the tokens of one prompt with examples, and smezo has a prompt for each row",
    "lily": "reads weights of one layer in the forward of others, where no probe reaches them",
    "multitask_prompt_tuning": "needs the number of its task beside each row",
    "osf": "is a projection of gradients, and a zeroth-order step has none",
    "peanut": "reads weights of layers without calling them, where no probe reaches them",
    "poly": "needs the number of its task beside each row",
    "prefix_tuning": "is smezo's own: choose method=mezo_prefix or method=prefix",
    "pvera": "draws noise in its forward, and a step compares losses of one function",
    "shadow": "carries a second model through the first one, which scores cannot be read from",
    "xlora": "mixes adapters that are trained already",
}

_BY_SMEZO = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "task_type"),
)

_OF_TEXT = "is read by prompt_tuning_init=TEXT alone, which has peft load a tokenizer by name"

_OF_BASE = "writes to the weights of the model, which must stay as they came"

#: fields that leave a kind unfit at any other values than these, and why
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "alora_invocation_tokens": ((None,), "needs the place of these tokens in each row"),
    "bias": (("none",), "trains vectors of the model itself, which must stay as they came"),
    "encoder_reparameterization_type": (
        ("MLP",),
        "is a layer of torch that keeps its weights where no probe reaches them",
    ),
    "init_lora_weights": (
        (True, False, "gaussian", "orthogonal"),
        f"needs data, or {_OF_BASE}",
    ),
    "layer_replication": ((None,), "changes the layers of the model, which must stay as they came"),
    "megatron_config": ((None,), "has peft import a module by name"),
    "megatron_core": (("megatron.core",), "has peft import a module by name"),
    "modules_to_save": (
        (None, []),
        "trains whole modules of the model; an adapter stands beside it",
    ),
    "prompt_tuning_init": (
        ("RANDOM", "SAMPLE_VOCAB"),
        "has peft load a tokenizer by name",
    ),
    **dict.fromkeys(
        ("prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"),
        ((None,), _OF_TEXT),
    ),
    "runtime_offload_base_weight": ((False,), "takes weights of the model away"),
    "save_only_topk_weights": ((False,), "saves less than is trained"),
    "target_parameters": ((None, []), "is computed where no probe reaches it"),
    "velora_config": ((None,), "compresses what backpropagation keeps"),
}

#: what a kind cannot be made without, with an example
_NEEDED = {
    "adaption_prompt": {"adapter_len": "10", "adapter_layers": "30"},
    "p_tuning": {"num_virtual_tokens": "20"},
    "prompt_tuning": {"num_virtual_tokens": "20"},
    "trainable_tokens": {"token_indices": "[5,6]"},
}

#: fields that count what is trained, of which peft takes none or a negative number
_FROM_ONE = ("adapter_layers", "adapter_len", "num_vectors", "num_virtual_tokens")

#: fields that list tokens of the vocabulary, as a list or by the layer
_TOKENS = ("token_indices", "trainable_token_indices")

_PLAIN: dict[str, tuple[type, ...]] = {
    **{"int": (int,), "float": (float, int), "bool": (bool,), "str": (str,)},
    **dict.fromkeys(("list", "List", "tuple", "Tuple", "Sequence"), (list,)),
    **dict.fromkeys(("dict", "Dict", "Mapping"), (dict,)),
}
_WORDS: dict[type, str] = {
    **{int: "a whole number", float: "a number", bool: "true or false", str: "a word"},
    **{list: "a list", dict: "a mapping", type(None): "null"},
}


def checked_peft(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the node of an adapter of peft: its kind, and the fields of its config.

    Raises:
        UserError: a kind that is not there or cannot be trained; a field that the config of this
            kind has not, that smezo sets, or whose value is of another type or unfit.
    """
    kind, config = node.get("kind"), node.get("config", {})
    if kind is None:
        raise UserError(
            "method.adapter.kind=null: a config is of a kind of peft: add method.adapter.kind=lora "
            "or ia3, for example."
        )
    if isinstance(kind, str) and kind not in kinds() and kind.lower() in kinds():
        raise UserError(
            f"method.adapter.kind={kind}: kinds of peft are written in small letters here: write "
            f"method.adapter.kind={kind.lower()}."
        )
    if not isinstance(kind, str) or kind not in kinds():
        raise UserError(
            f"method.adapter.kind={shown(kind)} with method.adapter.config: peft has no such "
            f"kind{near(str(kind), [name for name in kinds() if name not in REFUSED])}."
        )
    if kind in REFUSED:
        out = "" if "choose" in REFUSED[kind] else ": choose another kind"
        raise UserError(f"method.adapter.kind={kind} {REFUSED[kind]}{out}.")
    if others := [name for name in node if name not in ("kind", "config")]:
        fields = "with fields of its config as method.adapter.config.FIELD=VALUE"
        raise UserError(
            f"method.adapter.{others[0]} is of smezo's own adapters, and {kind} with a config is "
            f"one of peft: choose method=mezo_peft method.adapter.kind={kind}, {fields}."
        )
    if not isinstance(config, Mapping):
        raise UserError(
            f"method.adapter.config={shown(config)}: it must be a mapping of fields of peft's "
            "config to values, for example method.adapter.config={target_modules: [q_proj]}."
        )
    known = fields_of(kind)
    for name, value in config.items():
        _check_field(kind, str(name), value, known)
    for name, example in _NEEDED.get(kind, {}).items():
        if config.get(name) in (None, []):
            key = f"method.adapter.config.{name}"
            raise UserError(f"{key} is needed by kind {kind}: add {key}={example}.")
    return {"kind": kind, "config": {str(name): value for name, value in config.items()}}


def _check_field(
    kind: str, name: str, value: object, known: Mapping[str, tuple[type, ...]]
) -> None:
    key = f"method.adapter.config.{name}"
    if name in _BY_SMEZO:
        raise UserError(f"{key} is set by smezo: leave it out.")
    if name not in known:
        names = [field for field in known if field not in _BY_SMEZO]
        raise UserError(f"there is no {key} of kind {kind}{near(name, names)}.")
    if "dropout" in name and not isinstance(value, bool) and value != 0:
        raise UserError(
            f"{key}={shown(value)}: a step compares losses of one function, and dropout draws "
            "another one at each forward: leave it out."
        )
    allowed, why = _ONLY.get(name, ((), ""))
    if why and not any(value == one and type(value) is type(one) for one in allowed):
        ways = " or ".join(shown(one) for one in allowed if one != [])
        raise UserError(f"{key}={shown(value)} {why}: set {ways}.")
    types = known[name]
    if not set(types) - {type(None)}:
        raise UserError(f"{key} is an object of peft that no setting can write: leave it out.")
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        words = [_WORDS[type_] for type_ in types if type_ is not int or float not in types]
        raise UserError(f"{key}={shown(value)}: it must be {' or '.join(words)}.")
    if name in _FROM_ONE and isinstance(value, int) and value < 1:
        raise UserError(f"{key}={shown(value)}: it must be a whole number from 1.")
    if isinstance(value, list):
        _check_entries(key, value, _entry_types(kind, name))
    if name in _TOKENS and isinstance(value, list | dict):
        for tokens in value.values() if isinstance(value, dict) else [value]:
            _check_tokens(key, tokens)


def _check_entries(key: str, entries: Sequence[object], types: tuple[type, ...]) -> None:
    for entry in entries if types else ():
        if not isinstance(entry, types) or (isinstance(entry, bool) and bool not in types):
            words = [_WORDS[type_] for type_ in types if type_ is not int or float not in types]
            raise UserError(
                f"{key}={shown(list(entries))}: {shown(entry)} must be {' or '.join(words)}."
            )


def _check_tokens(key: str, tokens: object) -> None:
    """Refuse what are no numbers of different tokens; those beyond the vocabulary peft refuses."""
    if (
        not isinstance(tokens, list)
        or not tokens
        or any(
            not isinstance(token, int) or isinstance(token, bool) or token < 0 for token in tokens
        )
        or len(set(tokens)) < len(tokens)
    ):
        raise UserError(
            f"{key}: {shown(tokens)} must be a list of tokens as whole numbers from 0, each once, "
            "such as [5,6]."
        )


@functools.cache
def kinds() -> dict[str, tuple[Path, str]]:
    """Return the kinds that peft registers: of each, its folder and the name of its config."""
    found = {}
    for file in sorted((_root() / "tuners").glob("*/__init__.py")):
        for call in ast.walk(_tree(file)):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "register_peft_method":
                given = {word.arg: word.value for word in call.keywords}
                name, config = given.get("name"), given.get("config_cls")
                if isinstance(name, ast.Constant) and isinstance(config, ast.Name):
                    found[str(name.value)] = file.parent, config.id
    return found


@functools.cache
def fields_of(kind: str) -> dict[str, tuple[type, ...]]:
    """Return the fields of a kind's config, with the plain types that each one takes."""
    return {
        field: tuple(dict.fromkeys(_types(annotation)))
        for field, annotation in _annotations(kind).items()
    }


def _entry_types(kind: str, field: str) -> tuple[type, ...]:
    """Return the plain types of the entries of a field's list; none where peft names none."""
    found = dict[type, None]()
    for node in ast.walk(_annotations(kind)[field]):
        if isinstance(node, ast.Subscript) and list in _types(node.value):
            found |= dict.fromkeys(_types(node.slice))
    return tuple(found)


@functools.cache
def _annotations(kind: str) -> dict[str, ast.expr]:
    """Return the fields of a kind's config, with their annotations."""
    folder, name = kinds()[kind]
    return dict(_fields(folder, name))


def _fields(folder: Path, name: str) -> Iterator[tuple[str, ast.expr]]:
    """Yield the fields of a config class, those of its bases first."""
    root = _root()
    places = (folder / "config.py", root / "config.py", root / "tuners/lycoris_utils.py")
    for node in (node for place in places for node in _tree(place).body):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for base in node.bases:
                yield from _fields(folder, ast.unparse(base))
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    yield line.target.id, line.annotation
            return


def _types(annotation: ast.expr) -> Iterator[type]:
    """Yield the plain types of an annotation; none of what is a class of peft."""
    match annotation:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            yield from _PLAIN.get(name, ())
        case ast.Constant(value=None):
            yield type(None)
        case ast.Constant(value=str(text)):
            yield from _types(ast.parse(text, mode="eval").body)
        case ast.BinOp(left=left, right=right):
            yield from _types(left)
            yield from _types(right)
        case ast.Subscript(value=outer, slice=inner):
            of = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            name = ast.unparse(outer).rpartition(".")[2]
            if name == "Literal":
                yield from (type(one.value) for one in of if isinstance(one, ast.Constant))
            elif name in ("Optional", "Union"):
                yield from (type_ for one in of for type_ in _types(one))
                yield from [type(None)] if name == "Optional" else []
            else:
                yield from _types(outer)


def _root() -> Path:
    spec = importlib.util.find_spec("peft")  # imports nothing
    assert spec is not None  # smezo needs it
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else ast.parse("")

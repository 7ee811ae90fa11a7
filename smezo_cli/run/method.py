"""Build the method that the settings name, for the model that is loaded."""

from collections.abc import Mapping
from fnmatch import filter as matching
from typing import TYPE_CHECKING, Any

from smezo_cli.config.build import build, parameters_of, target_of
from smezo_cli.config.method_keys import shared_by, trait
from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError
from smezo_cli.models.modalities import without_unread
from smezo_cli.run.loaded import Loaded
from smezo_cli.zo.passes.choose import WORTH_IT, NoCompiler

if TYPE_CHECKING:
    from smezo_cli.methods.base import Method
    from smezo_cli.methods.frozen import InContext, LinearProbe, ZeroShot


def build_method(loaded: Loaded) -> "Method":
    """Return the method; its passes are compiled only where the run is long enough to earn that.

    Raises:
        UserError: the method refuses its settings.
    """
    s = loaded.settings
    node = without_unread(s.method, loaded.model, loaded.unread)
    runtime: dict[str, Any] = {"model": loaded.model, "seed": s.seed}
    parameters = parameters_of(target_of(s.method, "method"))
    if "check" in parameters:
        runtime["check"] = False  # the run checks by itself, with two rows
    if trait(s.method, "needs_mask", default=False):
        assert loaded.index is not None  # run/mask.py finds it before
        runtime["index"] = loaded.index
        node = _matching_alone(node, loaded)
    if "backend" in parameters:
        chosen = {"True": "compiled", "False": "eager", "auto": "auto"}
        runtime["backend"] = chosen[str(s.compile)]
        weights = sum(p.numel() for p in loaded.model.parameters())
        if s.compile == "auto" and loaded.device.type == "cpu" and weights * s.steps < WORTH_IT:
            runtime["backend"] = "eager"
    elif s.compile != "auto":
        raise _nothing_to_compile(loaded)
    try:
        method: Method = build(node, "method", **runtime)
    except NoCompiler as error:
        raise UserError(f"compile=true: {error}; mend that or leave compile out.") from error
    refuse_idle_ranks(s, method)
    return method


def refuse_idle_ranks(settings: Settings, method: object) -> None:
    """Refuse more query_ranks than a step has queries, where only the model says how many.

    Where the settings say it, run/ranks.py refuses before anything is loaded.

    Raises:
        UserError: there are fewer.
    """
    shared, queries = shared_by(settings.method)
    groups = getattr(method, "num_groups", None)
    if queries is not None or groups is None or groups >= settings.query_ranks:
        return
    there_are = "is 1 query" if groups == 1 else f"are {groups} queries"
    more = " or ".join(f"method.{key}" for key in shared if settings.method[key] is not None)
    raise UserError(
        f"query_ranks={settings.query_ranks}: in this model there {there_are} to share; raise "
        f"{more}, or lower query_ranks."
    )


def build_frozen(loaded: Loaded) -> "ZeroShot | InContext | LinearProbe":
    """Return the method, where it takes no steps.

    Raises:
        UserError: the method refuses its settings.
    """
    s = loaded.settings
    if s.compile != "auto":
        raise _nothing_to_compile(loaded)
    method: ZeroShot | InContext | LinearProbe = build(s.method, "method", seed=s.seed)
    return method


def _nothing_to_compile(loaded: Loaded) -> UserError:
    s = loaded.settings
    return UserError(
        f"compile={str(s.compile).lower()}: method {s.method['name']} has no passes to "
        "compile; leave compile out."
    )


def _matching_alone(node: Mapping[str, Any], loaded: Loaded) -> Mapping[str, Any]:
    """Return the method's node without globs of weights that are codes now, and so frozen."""
    if node.get("frozen_bits") is None:
        return node
    trained = [name for name, p in loaded.model.named_parameters() if p.requires_grad]
    return {**node, "freeze": [g for g in node["freeze"] if matching(trained, g)]}

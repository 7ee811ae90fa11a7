"""Build the object that a node's _target_ names, with the arguments that it takes."""

import importlib.util
import inspect
import pkgutil
import typing
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from smezo_cli.config.fixed import plain
from smezo_cli.config.settings import check_target
from smezo_cli.errors import UserError, near

# --- objects from nodes ----------------------------------------------------------------------


def build(node: Mapping[str, Any], key: str = "method", /, **runtime: Any) -> Any:
    """Return what the `_target_` of a node makes of its other keys and of `runtime`.

    A nested node with a `_target_` becomes a `functools.partial` of its target. The key `name` is
    ours unless the target takes it, and so are `method.adapter` and the `method.objective` of a
    zeroth-order method. `key` is where the node sits, for messages. Targets spell their arguments
    out: there is no check through `**keywords`.

    Raises:
        UserError: a target that is not allowed or not found, a key it does not take, one it needs,
            or its own ValueError.
    """
    values = plain(node)
    target = target_of(values, key)
    parameters = parameters_of(target)
    given = _keywords(values, key, target, runtime)
    given |= {name: value for name, value in runtime.items() if name in parameters}
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in given:
            raise UserError(f"{key}.{name} is needed by {values['_target_']}: add {key}.{name}=...")
    try:
        return target(**given)
    except ValueError as error:
        raise UserError(f"{key}: {error}.") from error


def target_of(node: Mapping[str, Any], key: str) -> Callable[..., Any]:
    """Return the class that the `_target_` of a node names: a method, or an optimizer of torch.

    A name leads to a module that is listed in one of the two packages and to a class in it, never
    through what a module has imported, so that settings from elsewhere run no code but these.

    Raises:
        UserError: the name leads to anything else.
    """
    name = check_target(node, key)
    package = importlib.import_module(".".join(name.split(".")[:2]))
    *inside, word = name.split(".")[2:]
    module = package
    if inside:
        known = [found.name for found in pkgutil.iter_modules(package.__path__)]
        if inside[0] not in known:
            raise UserError(f"{key}._target_={name} is not there{near(inside[0], known)}.")
        module = importlib.import_module(f"{package.__name__}.{inside[0]}")
    target = vars(module).get(word)
    if target is None:
        classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
        raise UserError(f"{key}._target_={name} is not there{near(word, classes)}.")
    if package.__name__ == "torch.optim":
        from torch.optim import Optimizer

        allowed = inspect.isclass(target) and issubclass(target, Optimizer)
    else:
        allowed = inspect.isclass(target) and target.__module__ == module.__name__
    if not allowed:
        what = "class" if inspect.isclass(target) else type(target).__name__
        raise UserError(
            f"{key}._target_={name} is a {what} and neither a method of smezo_cli.methods nor an "
            "optimizer of torch.optim, the only ones allowed."
        )
    return typing.cast(Callable[..., Any], target)


def _keywords(
    node: Mapping[str, Any], key: str, target: Callable[..., Any], runtime: Collection[str] = ()
) -> dict[str, Any]:
    parameters = parameters_of(target)
    taken = [name for name in parameters if name not in runtime]
    keywords: dict[str, Any] = {}
    for name, value in node.items():
        if name == "_target_" or (name == "name" and name not in parameters):
            continue
        if f"{key}.{name}" == "method.adapter":  # is in the model already
            continue
        if f"{key}.{name}" == "method.objective" and _compares_losses(target):  # the scorer's
            continue
        if name not in taken:
            raise UserError(f"{key} takes no {name}{near(name, taken)}.")
        if isinstance(value, Mapping) and "_target_" in value:
            inner = target_of(value, f"{key}.{name}")
            value = partial(inner, **_keywords(value, f"{key}.{name}", inner))
        keywords[name] = value
    return keywords


def _compares_losses(target: Callable[..., Any]) -> bool:
    """Return whether a method compares losses alone, so that any metric may be its objective."""
    return bool(getattr(target, "compares_losses", False))


def parameters_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the arguments of a target, with those that ``**common: Unpack[Common]`` stands for."""
    found: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            found[name] = parameter
            continue
        hints = typing.get_type_hints(target.__init__)
        for common in typing.get_args(hints.get(name)):
            for key in common.__annotations__:
                default = parameter.empty if key in common.__required_keys__ else None
                found[key] = inspect.Parameter(key, parameter.KEYWORD_ONLY, default=default)
    return found

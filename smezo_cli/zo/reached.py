"""Decide whether every perturbed parameter reaches the loss through its probe.

A probe replaces parameters only inside the forward of the module that owns them; one that is read
elsewhere keeps its value. Two things tell:
an operation takes it while a probe is active (:class:`Reads`), and the loss at the moved copy is
not that of the weights overwritten in place (:class:`Rounding` says what counts as equal).
"""

import fnmatch
import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smezo_cli.zo.probe import FunctionalProbe

T = TypeVar("T")

#: factors of the self-check's step at which a parameter is asked, until its effect can be seen
SCALES = (1.0, 16.0, 256.0)
#: modules that hold others, or parameters, and have no forward
_LISTS = (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)
_SAFETY = 8.0  # times the noise that was seen in a few losses
_MANY = 5  # names; more are written as globs
_ALWAYS_SAVED = 1_000_000  # weights; few beside a model that is worth training


class Unreached(ValueError):
    """Say that functional probes cannot perturb some parameters.

    Attributes:
        names: of the parameters.
        globs: those that ``freeze`` takes to leave them as they are, and no others.
        what: the sentence up to what can be done.
    """

    def __init__(self, kinds: Mapping[str, str], names: Iterable[str], hint: str = "") -> None:
        """Name parameters (with their kinds), among all ``names``; the hint comes first."""
        self.names, self.globs = list(kinds), globs_of(list(kinds), names)
        shown = self.names if len(self.names) <= _MANY else self.globs
        some = f"{_few(shown)} ({_few(dict.fromkeys(kinds.values()))})"
        self.what = f"functional probes do not reach {some}: {hint}"
        super().__init__(f"{self.what}freeze them (freeze={self.globs}), or use executor=in_place")


def _few(words: Iterable[str]) -> str:
    """Return the first of them, and how many more there are."""
    first = list(words)
    more = f" and {len(first) - _MANY} more" if len(first) > _MANY else ""
    return ", ".join(first[:_MANY]) + more


def globs_of(names: Sequence[str], others: Iterable[str]) -> list[str]:
    """Return globs of these names and none of the others: one for layers that differ by number.

    Args:
        names: of parameters.
        others: of all that could be matched; these names may be among them.
    """
    left, found = set(names), []
    others = set(others) - left
    for name in names:
        if name in left:
            glob = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
            # The shortest end of the name that tells it from the others.
            parts = glob.split(".")
            ends = [f"*.{'.'.join(parts[i:])}" for i in range(len(parts) - 2, 0, -1)]
            for wide in (*ends, glob) if glob != name else ():
                if not fnmatch.filter(others, wide):
                    glob = wide
                    break
            else:
                glob = name
            found.append(glob)
            left -= set(fnmatch.filter(left, glob))
    return found


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Move nothing, and note which parameters are read by anything else.

    Under a probe with it the loss is that of the weights as they are, and every operation that
    takes a parameter itself, or a part or view of it, reads what a probe does not move.

    Args:
        parameters: those that are perturbed.

    Attributes:
        read: ``id`` of those that were read.
        moved: ``id`` of those that the probe asked for.
        eps: relative rounding of the coarsest dtype that was computed in.
        loss: that of a closure, for who asks.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.read: set[int] = set()
        self.moved: set[int] = set()
        self.eps, self.loss = torch.finfo(torch.float32).eps, math.nan
        self._is_moving = False
        # Several parameters may be parts of one storage.
        self._where: dict[int, list[tuple[int, int, int]]] = {}
        for p in parameters:
            self._where.setdefault(p.untyped_storage()._cdata, []).append((*_extent(p), id(p)))
            self.eps = max(self.eps, torch.finfo(p.dtype).eps)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what the operation reads, and do it."""
        kwargs = kwargs or {}
        if not self._is_moving and not func.is_view and not _asks_shape(func):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                    self._note(leaf)
        return func(*args, **kwargs)

    def _note(self, tensor: Tensor) -> None:
        if tensor.dtype in (torch.bfloat16, torch.float16) and tensor.numel() > 1:
            self.eps = max(self.eps, torch.finfo(tensor.dtype).eps)
        try:
            places = self._where.get(tensor.untyped_storage()._cdata, ())
        except (NotImplementedError, RuntimeError):  # of a tensor that has no storage
            return
        if places:
            start, end = _extent(tensor)
            self.read |= {i for first, last, i in places if start < last and first < end}

    def whole(self, parameter: Tensor, out: Tensor) -> None:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        with self._moving(parameter):
            out.copy_(parameter.detach().view(-1))

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """See :class:`smezo_cli.zo.probe.Mover`."""
        with self._moving(parameter):
            return parameter.detach().index_select(0, rows)

    def _moving(self, parameter: Tensor) -> "_Moving":
        self.moved.add(id(parameter))
        return _Moving(self)


class _Moving:
    """Count what is read inside as read by the mover."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    def __enter__(self) -> None:
        self._reads._is_moving = True

    def __exit__(self, *_: object) -> None:
        self._reads._is_moving = False


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a strided tensor in its storage, and the one behind its last."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    if not tensor.numel():
        return start, start
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    size = 1 + int(sum((length - 1) * stride for length, stride in pairs))
    return start, start + size * tensor.element_size()


def _asks_shape(func: Any) -> bool:
    """Return whether an operation takes a tensor for its shape, dtype and device alone."""
    name: str = func.overloadpacket.__name__
    return name.endswith("_like") or name.startswith("new_")


class Losses(NamedTuple):
    """Hold the losses of one move: by a probe, in the weights; and of the weights as they are."""

    functional: float
    in_place: float
    unmoved: float

    @property
    def error(self) -> float:
        """Return how far the probe is from the weights overwritten."""
        return abs(self.functional - self.in_place)

    @property
    def effect(self) -> float:
        """Return how far the move is seen in the loss at all."""
        return max(abs(x - self.unmoved) for x in (self.functional, self.in_place))


class Rounding(NamedTuple):
    """Hold what the arithmetic alone may do to a loss.

    Matrix products may be computed in another order for a copy than for the weight itself, and on
    some devices from call to call.

    Attributes:
        eps: relative rounding of the coarsest dtype that is computed in.
        of_loss: that of the dtype that the loss is in, float32 at best.
        noise: the largest difference seen between losses of the same weights.
    """

    eps: float
    of_loss: float
    noise: float

    def tolerance(self, loss: float) -> float:
        """Return the largest difference of losses of this size that rounding alone explains."""
        most = math.sqrt(self.eps) * abs(loss)
        return max(4 * self.of_loss * abs(loss), min(_SAFETY * self.noise, most))

    def is_random(self, first: float, second: float, is_drawn: bool) -> bool:
        """Return whether two losses of the same weights differ by more than rounding.

        Args:
            first: a loss.
            second: another one.
            is_drawn: a generator was used in between.
        """
        size = max(abs(first), abs(second))
        return abs(first - second) > (0.0 if is_drawn else math.sqrt(self.eps) / 8 * size)


class Reference(NamedTuple):
    """Hold the loss at the weights as they are, what rounding does to it, and whether it draws."""

    unmoved: float
    rounding: Rounding
    is_drawn: bool


def is_reached(ask: Callable[[float], Losses], rounding: Rounding, was_read_directly: bool) -> bool:
    """Return whether a probe of one parameter gives the loss of the weight overwritten.

    The move is enlarged until its effect is well above the rounding. A parameter that is not
    reached leaves the functional loss where it was, whatever the move; one that is reached agrees
    in half of the digits that the arithmetic has. Where no move is seen, what is known decides.

    Args:
        ask: the losses of a move enlarged by a factor.
        rounding: of the losses.
        was_read_directly: an operation took the parameter itself, so that there must be agreement
            in every digit to call it reached.
    """
    share = max(math.sqrt(rounding.eps), 0.01)
    seen = False
    for scale in (*SCALES, *(-scale for scale in SCALES)) if was_read_directly else SCALES:
        losses = ask(scale)
        if not all(map(math.isfinite, losses)):
            break
        least = max(rounding.tolerance(x) for x in losses)
        if losses.effect <= _SAFETY * least:
            continue
        seen = True
        agrees = losses.error <= (least if was_read_directly else max(least, share * losses.effect))
        if agrees != was_read_directly:
            return agrees
    return seen if was_read_directly else not seen


def search(asked: Sequence[T], agree: Callable[[Sequence[T]], bool]) -> list[T]:
    """Return those for which ``agree([one])`` is false, asked together as far as they agree."""
    if not asked or agree(asked):
        return []
    if len(asked) == 1:
        return list(asked)
    middle = len(asked) // 2
    return search(asked[:middle], agree) + search(asked[middle:], agree)


def enclosing(model: nn.Module, parameter: nn.Parameter) -> list[nn.Module]:
    """Return modules that contain all owners of one, the nearest first.

    They have parameters of their own, or a forward that was put in place of their class's (as TRL's
    SFTTrainer does to a model): these forwards are those that may read it by themselves. Around a
    ParameterDict or ParameterList, which has no forward, it is any module that has one.
    """
    paths = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if any(p is parameter for p in module._parameters.values())
    ]
    owners = {model.get_submodule(path) for path in paths}
    is_listed = all(isinstance(owner, _LISTS) for owner in owners)
    found = []
    first = paths[0]
    while first:
        first = first.rpartition(".")[0]
        module = model.get_submodule(first)
        is_around = all(not first or path.startswith(f"{first}.") for path in paths)
        owns = any(p is not None for p in module._parameters.values())
        may_read = owns or "forward" in vars(module)
        may_read = may_read or (is_listed and not isinstance(module, _LISTS))
        if is_around and may_read and module not in owners:
            found.append(module)
    return found


def generators(devices: Iterable[torch.device]) -> list[object]:
    """Return the states of the generators that a closure may draw from, to compare."""
    states: list[object] = [random.getstate(), torch.get_rng_state().numpy().tobytes()]
    for device in {d for d in devices if d.type == "cuda"}:
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = numpy.random.get_state()  # the user's
        states.append((kind, keys.tobytes(), *rest))
    return states


def random_closure(first: float, second: float, is_drawn: bool) -> str:
    """Return a sentence about a closure whose losses of the same weights differ."""
    gave = f"it gave {first:.9g} and then {second:.9g} at the same weights"
    if is_drawn:
        return (
            f"the closure is random: {gave}, and a step compares losses of one batch; switch "
            "dropout off (model.eval()), or seed inside the closure what it draws"
        )
    return (
        f"the closure gives another loss at each call: {gave}, and a step compares losses of one "
        "batch; take the batch before the closure, and have no module change at each call "
        "(model.eval())"
    )


def fast_path_of(model: nn.Module, parameter: nn.Parameter) -> str:
    """Return a hint where torch's own fast path reads the parameter, else ""."""
    kinds = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
    for module in model.modules():
        if isinstance(module, kinds) and any(p is parameter for p in module.parameters()):
            return (
                f"the fast path of nn.{type(module).__name__} reads them, so switch it off "
                "(torch.backends.mha.set_fastpath_enabled(False)), or "
            )
    return ""


def kinds_to_check(
    probe: FunctionalProbe, names: Mapping[int, str], num_weights: int
) -> dict[str, list[str]]:
    """Return what the self-check moves, by kind: (module class, parameter name) of the owner.

    All of a kind, where their exact copies are small beside the model. Of a larger kind, of those
    whose names differ in numbers alone, as those of layers do, the first and the last.

    Args:
        probe: knows the owners.
        names: of the parameters to check, by their ``id``.
        num_weights: of all.
    """
    chosen: dict[str, list[str]] = {}
    for kind, places in _by_kind(probe, names).items():
        sizes = {n: size for alike in places for n, size in alike.items()}
        few = sum(sizes.values()) <= _most_saved(num_weights)
        chosen[kind] = list(sizes) if few else [n for a in places for n in _ends(list(a))]
    return chosen


def alike(probe: FunctionalProbe, names: Mapping[int, str], kind: str) -> list[str]:
    """Return all parameters of a kind of :func:`kinds_to_check`."""
    return [name for places in _by_kind(probe, names)[kind] for name in places]


def _by_kind(probe: FunctionalProbe, names: Mapping[int, str]) -> dict[str, list[dict[str, int]]]:
    """Return sizes by name, those together whose names differ in numbers alone, by kind."""
    kinds: dict[str, dict[str, dict[str, int]]] = {}
    for module, own in probe.owners:
        for name in own:
            parameter = module._parameters[name]
            assert parameter is not None
            if id(parameter) not in names:
                continue
            full = names[id(parameter)]
            places = kinds.setdefault(f"{type(module).__name__}.{name}", {})
            # A tied parameter counts once.
            places.setdefault(re.sub(r"\d+", "*", full), {})[full] = parameter.numel()
    return {kind: list(places.values()) for kind, places in kinds.items()}


def _ends(items: list[str]) -> Iterator[str]:
    yield items[0]
    yield from items[1:][-1:]


def _most_saved(num_weights: int) -> int:
    return max(num_weights // 50, _ALWAYS_SAVED)


def checked_together(sizes: Sequence[int], num_weights: int) -> list[slice]:
    """Yield parts of a kind that the self-check moves at once: small, or one tensor.

    Args:
        sizes: weights of the kind's parameters.
        num_weights: of all.
    """
    parts: list[slice] = []
    left = 0
    for i, size in enumerate(sizes):
        if size > left or not parts:
            parts.append(slice(i, i))
            left = _most_saved(num_weights)
        parts[-1] = slice(parts[-1].start, i + 1)
        left -= size
    return parts

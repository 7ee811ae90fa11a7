"""Compute losses at several points in one forward: the rows of all points as one batch.

The model runs once on its inputs, repeated once a point, and reads what is not perturbed once for
all. A module that owns perturbed parameters computes each point's rows with the parameters of that
point. A linear layer whose perturbation is a product of two thin matrices gets no copy of its
weight: y = x W^T + (x right^T) left^T. Neither has the bits of a forward of its own, but sums of
another order: numbers agree to rounding.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smezo_cli.zo.passes.low_rank import Factors
from smezo_cli.zo.probe import FunctionalProbe, Mover, moves_nothing
from smezo_cli.zo.turns import same_inputs, standing_in

# Entries of the moved copies of a linear layer, of all points, up to which they are made together.
_STACKED = 1 << 22


class NotBatched(ValueError):
    """Say why a model or a loss cannot be computed at several points in one batch."""


class Points:
    """Runs the forwards of a model at several points as one.

    Args:
        model: whose own forward is run for all points; modules called from elsewhere are refused.
        probe: of the model.
        name: of the executor that it is for, which a refusal names.
    """

    def __init__(self, model: nn.Module, probe: FunctionalProbe, name: str = "batched") -> None:
        self._model, self._probe, self._name = model, probe, name
        self._movers: Sequence[Mover] = ()
        self._rows = 0  # of one point, in the call of the model that is under way
        self._is_running = self._is_inside = False
        #: inputs of each call, and what it gave at each point
        self._calls: list[tuple[Any, list[Any]]] = []
        #: of each module, whether its inputs were rows or common to all points
        self._is_split: dict[nn.Module, bool] = {}
        #: the dtype of matrix products under autocast, where that was met
        self.autocast: torch.dtype | None = None

    @contextmanager
    def first(self, movers: Sequence[Mover]) -> Iterator[None]:
        """Inside, each call of the model computes all points and returns what the first one gives.

        Args:
            movers: of the points; all move the same parameters, but for those that move none.

        Raises:
            NotBatched: the model or its inputs do not allow it.
        """
        self._movers, self._calls = movers, []
        # One that moves something says which modules have points of their own.
        mover = next((mover for mover in movers if not moves_nothing(mover)), movers[0])
        self._is_running = len(movers) == 1  # whoever calls a module then, there is one point
        run_all = standing_in(self._model, self._run_all, lambda: self._is_running)
        try:
            with self._named(), self._probe.at(mover), self._split():
                if len(movers) == 1:
                    yield
                else:
                    with run_all:
                        yield
        finally:
            self._movers, self._is_running = (), False

    @contextmanager
    def later(self, point: int) -> Iterator[None]:
        """Inside, calls of the model return, one after the other, what they gave at a point.

        Raises:
            NotBatched: when left, if there were fewer calls than before; at a call, if its inputs
                are others.
        """
        calls = iter(self._calls)

        def replay(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            inputs, outputs = next(calls, (None, ()))
            if inputs is None or not same_inputs(inputs, (args, kwargs)):
                refuse("two calls of the closure give the model other inputs")
            return outputs[point]

        with self._named():
            with standing_in(self._model, replay, lambda: False):
                yield
            if next(calls, None) is not None:
                refuse("a later call of the closure calls the model less often than the first")

    def forget(self) -> None:
        """Drop the outputs that were kept."""
        self._calls = []

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Make refusals name the executor."""
        try:
            yield
        except NotBatched as error:
            why = f"executor={self._name} cannot be used: {error}; use executor=sequential"
            raise NotBatched(why) from None

    # --- the model ----------------------------------------------------------------------------

    def _run_all(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for module in self._model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                refuse(f"the rows of a batch see each other in its {type(module).__name__}")
        self._rows = _num_rows((*args, *kwargs.values()))
        repeat = functools.partial(_repeated, rows=self._rows, times=len(self._movers))
        self._is_running = True
        try:
            found = inner(*repeat(args), **repeat(kwargs))
        finally:
            self._is_running = False
        outputs = [self._output(found, k) for k in range(len(self._movers))]
        self._calls.append(((args, kwargs), outputs))
        return outputs[0]

    def _output(self, value: Any, point: int) -> Any:
        """Return what the model gave at a point."""
        if isinstance(value, Tensor):
            part = self._part(value, point)
            if part is None:
                shape = list(value.shape)
                refuse(f"the model returns a tensor of shape {shape}, which is not row by row")
            return part
        return _each(value, lambda item: self._output(item, point), _refuse_output)

    def _part(self, value: Tensor, point: int) -> Tensor | None:
        """Return the rows of a point, if a tensor's first dimension goes over the rows of all."""
        points = len(self._movers)
        size, rest = divmod(value.shape[0], points) if value.dim() else (0, 0)
        is_by_row = not rest and size % self._rows == 0 if value.dim() > 1 else size == self._rows
        # Before an output layer that picks positions there may be one row a point.
        if rest or not size or not (is_by_row or (value.dim() > 2 and size == 1)):
            return None
        return value.narrow(0, point * size, size)

    # --- its modules --------------------------------------------------------------------------

    @contextmanager
    def _split(self) -> Iterator[None]:
        """Let each wrapped module compute point by point."""
        wrapped = [
            (module, module.__dict__["forward"], names) for module, names in self._probe.moved()
        ]
        for module, single, names in wrapped:
            module.__dict__["forward"] = self._wrap(module, single, names)
        try:
            yield
        finally:
            for module, single, _ in wrapped:
                module.__dict__["forward"] = single

    def _wrap(
        self, module: nn.Module, single: Callable[..., Any], names: Sequence[str]
    ) -> Callable[..., Any]:
        plain = self._probe.plain_forward(module)

        def forward(*args: Any, only_rows: Tensor | None = None, **kwargs: Any) -> Any:
            more = {} if only_rows is None else {"only_rows": only_rows}
            if self._is_inside:  # of a module whose point is chosen
                return single(*args, **more, **kwargs)
            if not self._is_running:
                refuse(f"the closure calls a {type(module).__name__} of the model by itself")
            if plain is not None and len(args) == 1 and not kwargs and only_rows is None:
                found = self._linear(module, plain, args[0], names)
                if found is not None:
                    return found
            return self._point_by_point(module, single, args, kwargs, more)

        forward.is_probe = True  # type: ignore[attr-defined]  # read by only_rows
        return forward

    def _point_by_point(
        self,
        module: nn.Module,
        single: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        more: Mapping[str, Any],
    ) -> Any:
        """Return what a module gives, by a forward at each point on the rows of that point."""
        is_split = False

        def part(value: Any, point: int) -> Any:
            nonlocal is_split
            if isinstance(value, Tensor):
                own = value if len(self._movers) == 1 else self._part(value, point)
                is_split = is_split or own is not None
                return value if own is None else own
            return _each(value, lambda item: part(item, point), lambda item: item)

        found = []
        for k, mover in enumerate(self._movers):
            with self._probe.pointed_at(mover), self._inside():
                of_point = {name: part(value, k) for name, value in kwargs.items()}
                found.append(single(*[part(value, k) for value in args], **of_point, **more))
        if len(found) == 1:
            return found[0]
        # Seen once, at the first losses, which are checked.
        if self._is_split.setdefault(module, is_split) != is_split:
            refuse(f"it cannot be told which inputs of a {type(module).__name__} are rows")
        return self._joined(found, is_split)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self._is_inside = True
        try:
            yield
        finally:
            self._is_inside = False

    def _joined(self, found: list[Any], is_split: bool) -> Any:
        """Return what a module gave at each point, as rows."""
        one = found[0]
        if isinstance(one, Tensor):
            if not is_split and (one.dim() < 2 or one.shape[0] != 1):
                refuse("a module computes what all rows have in common, without a dimension for it")
            if not is_split:
                found = [x.expand(self._rows, *x.shape[1:]) for x in found]
            return torch.cat(found)
        if isinstance(one, (tuple, list)):
            items = [self._joined(list(x), is_split) for x in zip(*found, strict=True)]
            return _like(one, items)
        if isinstance(one, dict):
            return _like(one, {k: self._joined([x[k] for x in found], is_split) for k in one})
        if any(x != one for x in found):
            refuse(f"a module returns a {type(one).__name__} that is another at each point")
        return one

    def _linear(
        self, module: nn.Module, plain: Callable[[Tensor], Tensor], x: Any, names: Sequence[str]
    ) -> Tensor | None:
        """Return what a linear layer gives by its thin products, or by copies side by side.

        None where there are neither.
        """
        points = len(self._movers)
        if not isinstance(x, Tensor) or x.dim() < 2 or "weight" not in names:
            return None
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            self.autocast = torch.get_autocast_dtype(x.device.type)
        if points > 1 and self._part(x, 0) is None:
            return None
        weight, bias = module.get_parameter("weight"), module._parameters["bias"]
        thin = self._thin(weight)
        if thin is not None:
            y = plain(x)
            flat = y.view(points, -1, y.shape[-1])
            right, left = thin
            if right.dim() == 2:  # of all points
                inner = F.linear(x, right.to(x.dtype)).view(points, -1, right.shape[0])
            else:
                inner = x.reshape(points, -1, x.shape[-1]) @ right.to(x.dtype).mT
            flat.baddbmm_(inner.to(y.dtype), left.to(y.dtype).mT)
        elif points > 1 and points * weight.numel() <= _STACKED:
            moved = self._copies(weight)
            flat = x.reshape(points, -1, x.shape[-1]) @ moved.mT
            y = flat.view(*x.shape[:-1], moved.shape[1])
            if bias is not None:
                flat += bias.to(flat.dtype)
        else:
            return None
        if bias is not None and "bias" in names:  # which is in y as it is
            flat += (self._copies(bias) - bias)[:, None].to(flat.dtype)
        self._is_split[module] = True
        return y

    def _thin(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return right factors, (r, in) if all points share one, or (points, r, in); and left ones.

        The latter are (points, out, r), zeros where nothing is moved. None: at some point it is
        moved along no such product.
        """
        found: list[Factors] = []
        for mover in self._movers:
            if moves_nothing(mover):
                continue
            ask = getattr(mover, "thin", None)
            one = None if ask is None else ask(weight)
            if one is None or (found and one.right.shape != found[0].right.shape):
                return None
            found.append(one)
        nothing = Factors(torch.zeros_like(found[0].left), found[0].right)
        moved = iter(found)
        of_points = [nothing if moves_nothing(mover) else next(moved) for mover in self._movers]
        rights = [one.right for one in of_points]
        is_shared = all(right is rights[0] for right in rights)
        left = torch.stack([one.left for one in of_points])
        return rights[0] if is_shared else torch.stack(rights), left

    def _copies(self, parameter: Tensor) -> Tensor:
        """Return the parameter at each point (points, ...)."""
        made = torch.empty(
            (len(self._movers), *parameter.shape), dtype=parameter.dtype, device=parameter.device
        )
        for mover, copy in zip(self._movers, made, strict=True):
            mover.whole(parameter, copy.view(-1))
        return made


def refuse(why: str) -> NoReturn:
    """Say why not; whoever runs the points adds which executor it is.

    Raises:
        NotBatched: always.
    """
    raise NotBatched(why)


def _each(value: Any, of: Callable[[Any], Any], other: Callable[[Any], Any]) -> Any:
    """Return a nested value with each of its items replaced; of what holds none, by ``other``."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if isinstance(value, (tuple, list)):
        return _like(value, [of(item) for item in value])
    if isinstance(value, dict):
        return _like(value, {name: of(item) for name, item in value.items()})
    return other(value)


def _like(value: Any, items: Any) -> Any:
    """Return items in a container like another: tuple, named tuple, list, dict or subclass."""
    if isinstance(value, dict):
        return items if type(value) is dict else type(value)(**items)
    return value._make(items) if hasattr(value, "_make") else type(value)(items)


def _refuse_output(value: Any) -> NoReturn:
    kind = type(value).__name__
    hint = " (call it with use_cache=False)" if "Cache" in kind else ""
    refuse(f"the model returns a {kind}{hint}")


def _refuse_input(value: Any) -> NoReturn:
    refuse(f"the model is given a {type(value).__name__}")


def _num_rows(inputs: Sequence[Any]) -> int:
    """Return the size of a batch: the first dimension of the first tensor that has several."""
    for value in inputs:
        if isinstance(value, Tensor) and value.dim() > 1:
            return value.shape[0]
    refuse("none of the model's inputs is a tensor of two dimensions or more, which has rows")


def _repeated(value: Any, rows: int, times: int) -> Any:
    """Return inputs with their rows repeated; what is no row (positions to keep) stays as it is."""
    if isinstance(value, Tensor):
        if value.dim() < 2 or value.shape[0] != rows:
            return value
        return value.repeat(times, *[1] * (value.dim() - 1))
    return _each(value, lambda item: _repeated(item, rows, times), _refuse_input)

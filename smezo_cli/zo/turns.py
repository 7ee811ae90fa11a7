"""Run two forwards in turns: the losses at theta+ and theta- with one draw for both.

The model's forward runs twice on the same inputs, here at theta+ and in a second thread at theta-.
Only one of the two runs at a time: each goes as far as the next module that owns perturbed
parameters, computes it, and lets the other catch up. Whoever is there first draws the noise for
both. Each forward consists of the operations of a forward of its own on tensors of the same shapes,
so the bits are those of one forward after the other; nothing is asked of the model's inputs and
outputs but that inputs are not written to.
"""

import contextvars
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from smezo_cli.zo.passes import openmp


class NotInLockstep(ValueError):
    """Say that the two forwards of a model or a loss cannot run in turns."""


class _Stop(BaseException):
    """Unwinds the second forward when the first has failed."""


class Turns:
    """Runs the forwards of a model at theta+ and theta- in turns.

    Args:
        model: whose own forward is paired; modules called from elsewhere are refused.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.side = 0  # of the forward whose turn it is: 0 at theta+, 1 at theta-
        self.is_running = False
        self._turn = threading.Semaphore(0), threading.Semaphore(0)
        self._has_ended = [True, True]
        self._is_stopping = False
        self._thread: ThreadPoolExecutor | None = None
        self._kept: deque[tuple[Any, Any]] = deque()  # inputs and theta-'s output of each call

    @contextmanager
    def first(self) -> Iterator[None]:
        """Inside, each call of the model runs both forwards and returns what theta+ gives.

        What theta- gives is kept until :meth:`second` has returned it.
        """
        self._kept.clear()
        try:
            with self._instead(self._run_both):
                yield
        except BaseException:
            self._kept.clear()  # where memory was too small, this is what there is to free
            raise

    @contextmanager
    def second(self) -> Iterator[None]:
        """Inside, the calls of the model return, one after the other, what theta- gave.

        Raises:
            NotInLockstep: when left, if there were fewer calls than before; at a call, if its
                inputs are others.
        """
        kept, self._kept = self._kept, deque()

        def replay(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            # Taken out, so that it lives no longer than the closure needs it.
            inputs, output = kept.popleft() if kept else (None, None)
            if inputs is None or not same_inputs(inputs, (args, kwargs)):
                refuse("the two calls of the closure give the model other inputs")
            return output

        with self._instead(replay):
            yield
        if kept:
            refuse("the second call of the closure calls the model less often than the first")

    def _instead(self, function: Callable[..., Any]) -> AbstractContextManager[None]:
        return standing_in(self._model, function, lambda: self.is_running)

    def _run_both(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        _check_inputs((args, kwargs))
        self._has_ended, self._is_stopping = [False, False], False
        self.side, self.is_running = 0, True
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="smezo-lockstep")
        setting = _thread_setting()
        second = functools.partial(
            self._run_second, setting, torch.is_inference_mode_enabled(), inner, args, kwargs
        )
        other = self._thread.submit(contextvars.copy_context().run, second)
        try:
            plus = inner(*args, **kwargs)
            self._has_ended[0] = True
            if not self._has_ended[1]:
                self._give(0, 1)
        except BaseException as error:
            self._has_ended[0] = self._is_stopping = True
            while not other.done():  # its turn may be interrupted, but not left unfinished
                self._turn[1].release()
                _wait(other)
            failed = other.exception()
            if isinstance(error, _Stop) and failed is not None:
                raise failed from None
            raise
        finally:
            self.is_running = False
            self._turn = threading.Semaphore(0), threading.Semaphore(0)
        minus = other.result()
        self._kept.append(((args, kwargs), minus))
        return plus

    def _run_second(
        self,
        setting: Callable[[], None],
        is_inference: bool,
        inner: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        try:
            setting()
            self._take(1)
            # To enter it with False would turn gradients on.
            with torch.inference_mode() if is_inference else nullcontext():
                return inner(*args, **kwargs)
        except BaseException:
            self._is_stopping = not self._has_ended[0]
            raise
        finally:
            self._has_ended[1] = True
            self.side = 0
            self._turn[0].release()

    def give_turn(self) -> None:
        """Let the other forward go on until it gives the turn back, if it has not ended."""
        if self._is_stopping:
            raise _Stop
        mine = self.side
        if not self._has_ended[1 - mine]:
            self._give(mine, 1 - mine)

    def _give(self, mine: int, other: int) -> None:
        self.side = other
        self._turn[other].release()
        self._take(mine)

    def _take(self, mine: int) -> None:
        self._turn[mine].acquire()
        if self._is_stopping and not self._has_ended[mine]:
            raise _Stop


def _wait(other: "Future[Any]") -> None:
    with suppress(TimeoutError):
        other.exception(timeout=1)


def _thread_setting() -> Callable[[], None]:
    """Gives another thread what torch keeps a thread: grad mode, autocast, the stream."""
    grad = torch.is_grad_enabled()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    casts = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    caches = torch.is_autocast_cache_enabled()
    stream = torch.cuda.current_stream() if "cuda" in devices else None

    def apply() -> None:
        openmp.give_all()
        torch.set_grad_enabled(grad)
        for device, enabled, dtype in casts:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(caches)
        if stream is not None:
            torch.cuda.set_stream(stream)

    return apply


def _check_inputs(value: Any) -> None:
    """Refuse what a forward may write to, such as a cache of keys: two would write to it."""
    if isinstance(value, (tuple, list)):
        for item in value:
            _check_inputs(item)
    elif isinstance(value, dict):
        for item in value.values():
            _check_inputs(item)
    elif not (value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype))):
        refuse(f"the model is given a {type(value).__name__}, which both forwards would write to")


@contextmanager
def standing_in(
    model: nn.Module, function: Callable[..., Any], is_running: Callable[[], bool]
) -> Iterator[None]:
    """Let ``function(forward, *args, **kwargs)`` stand for a model's forward inside the context.

    Args:
        model: whose forward is replaced.
        function: is given the forward that was there, and the arguments of the call.
        is_running: says whether it runs that forward just now, which then may call its own model.
    """
    inner, held = model.forward, model.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        run = inner if is_running() else functools.partial(function, inner)
        return run(*args, **kwargs)

    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        if held is None:
            model.__dict__.pop("forward", None)
        else:
            model.__dict__["forward"] = held


def _close(a: Tensor, b: Tensor) -> bool:
    """Return whether numbers are equal, but for what rounding does to sums in any order."""
    if torch.equal(a, b) or not a.is_floating_point():
        return torch.equal(a, b)
    eps = 8 * torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=eps, atol=eps, equal_nan=True)


def same_inputs(a: Any, b: Any) -> bool:
    """Return whether two calls got the same: tensors by entries, on whatever device they are."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and _close(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_inputs(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same_inputs, a, b))
    return bool(a == b)


def refuse(why: str) -> NoReturn:
    """Say why not.

    Raises:
        NotInLockstep: always.
    """
    raise NotInLockstep(f"executor=lockstep cannot be used: {why}; use executor=sequential")

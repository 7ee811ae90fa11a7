"""Count the bytes of a forward by running it on the meta device."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any


def trace(
    held: Sequence[Any], call: Callable[[], Any], *, is_fused: bool = True
) -> tuple[int, int]:
    """Return the most bytes of tensors that live at once during ``call``, and those left after it.

    On the meta device questions about contents get the answer of an ordinary batch: nothing is
    padded, all rows of an embedding that are looked up differ.

    Args:
        held: tensors that do not count.
        call: computes on the meta device.
        is_fused: scaled dot product attention is computed without writing its scores out.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.weak import WeakIdKeyDictionary

    known: Any = WeakIdKeyDictionary()
    for tensor in held:
        known[tensor.untyped_storage()] = True
    live = peak = 0

    def freed(size: int) -> None:
        nonlocal live
        live -= size

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal live, peak
            aten = torch.ops.aten
            if func is aten._local_scalar_dense.default and args[0].is_meta:
                return True if args[0].dtype == torch.bool else 0
            if func is aten._unique2.default and args[0].is_meta:
                rows = args[0].new_empty(min(args[0].numel(), most_rows))
                result: Any = rows, torch.empty_like(args[0]), rows.new_empty(0)
            else:
                result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if not isinstance(leaf, torch.Tensor):
                    continue
                storage = leaf.untyped_storage()
                if storage not in known:
                    known[storage] = True
                    live += storage.nbytes()
                    peak = max(peak, live)
                    weakref.finalize(storage, freed, storage.nbytes())
            return result

    class Fused(TorchFunctionMode):
        """Keep the meta device from writing out the scores of sdpa, which no real device stores."""

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if func is not torch.nn.functional.scaled_dot_product_attention:
                return func(*args, **kwargs)
            query, key, value = args[:3]
            if (groups := query.shape[1] // key.shape[1]) > 1:
                key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, kwargs.get("is_causal", False)
            )[0]

    most_rows = max((t.shape[0] for t in held if t.ndim > 1), default=1)
    with Fused() if is_fused else nullcontext(), Counting():  # type: ignore[no-untyped-call]  # untyped in torch
        call()
    return peak, live


class Keep:
    """Move nothing, but take the memory that moving takes."""

    only = None  # it stands for a move of all

    def whole(self, parameter: Any, out: Any) -> None:
        """Take nothing: the scratch is there already."""

    def rows(self, parameter: Any, rows: Any) -> Any:
        """Return rows, while taking the memory of their indices and of the moved rows."""
        import torch

        picked = parameter.detach().index_select(0, rows)
        index = torch.empty(picked.shape, dtype=torch.int64, device=picked.device)
        moved = torch.empty_like(picked)
        del index
        return moved


class KeepThin(Keep):
    """Count as :class:`Keep` does, for matrices moved along thin products, which have no copies.

    Args:
        ranks: of these products, by ``id`` of the parameter.
        shared: what the points of a step have in common; the same dict for all of them.
    """

    def __init__(self, ranks: Mapping[int, int], shared: dict[int, Any]) -> None:
        self._ranks, self._shared = ranks, shared

    def thin(self, parameter: Any) -> Any:
        """Return the product's factors, without contents; None: a copy is made."""
        from smezo_cli.zo.passes.low_rank import Factors

        if id(parameter) not in self._ranks:
            return None
        rank, (rows, columns) = self._ranks[id(parameter)], parameter.shape
        if id(parameter) not in self._shared:
            self._shared[id(parameter)] = parameter.new_empty(rank, columns)
        return Factors(parameter.new_empty(rows, rank), self._shared[id(parameter)])


class PadOnly:
    """Stand in for a tokenizer where a scorer pads and no text is read."""

    pad_token_id = 0


def bytes_of(tensors: Any) -> int:
    """Return the bytes of these tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)

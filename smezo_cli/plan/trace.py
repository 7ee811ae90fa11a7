"""Count the bytes of a forward by running it on the meta device."""

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smezo_cli.errors import UserError

# Resident memory of a run on a CPU less its weights and tensors (Linux, torch 2.13, transformers
# 5.23, datasets 5.2): libraries, the embedded task's rows and tokens, and what an allocator keeps.
RUNTIME_CPU = 620_000_000

NUMBA = 100_000_000  # Numba, LLVM and the compiled passes, measured likewise

# Not measured: what CUDA, its libraries and their workspaces usually take on the device.
RUNTIME_CUDA = 1 << 29

THRESHOLD = 28  # bytes that masks.kth_magnitude takes for each entry of a chunk

OPTION_TOKENS = 16  # assumed of a choice task's options

NUM_OPTIONS = 10  # of a row of ReCoRD; other choice tasks name theirs

# Bytes of a weight in NF4: of 64 weights a scale of a byte, of 256 such scales one of float32.
PACKED = 0.5 + 1 / 64 + 4 / (64 * 256)

KEPT = 4 + 1  # bytes a weight of noise that is kept: z in float32, the mask


# --- counting ---------------------------------------------------------------------------------


def trace(held: Sequence[Any], call: Callable[[], Any]) -> tuple[int, int]:
    """Most bytes in tensors that live at once while ``call`` runs, and those that live behind it.

    Those of ``held`` do not count.

    Works on the meta device, where questions about contents get the answer of an ordinary batch:
    nothing is padded, all rows of an embedding that are looked up differ.
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
        """The meta device would write out the scores of sdpa, which no real device stores."""

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
    with Fused(), Counting():  # type: ignore[no-untyped-call]  # untyped in torch
        call()
    return peak, live


class Keep:
    """A mover that moves nothing, but takes the memory that moving takes."""

    def whole(self, parameter: Any, out: Any) -> None:
        """The scratch is there already, and a pass needs no more."""

    def rows(self, parameter: Any, rows: Any) -> Any:
        """As the rows of a direction: the rows, their indices, the moved rows."""
        import torch

        picked = parameter.detach().index_select(0, rows)
        index = torch.empty(picked.shape, dtype=torch.int64, device=picked.device)
        moved = torch.empty_like(picked)
        del index
        return moved


class PadOnly:
    """All that a scorer asks of a tokenizer."""

    pad_token_id = 0


# --- the architecture ---------------------------------------------------------------------------


def architecture(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model node with `config`: its own, or of the folder or the hub's cache that it names.

    Raises:
        UserError: neither has one.
    """
    if model.get("config"):
        return dict(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from transformers import CONFIG_MAPPING

    found: object = Path(str(model["path"])).expanduser() / "config.json"
    if isinstance(found, Path) and not found.is_file():
        try:
            found = try_to_load_from_cache(
                str(model["path"]), "config.json", revision=model["revision"] or "main"
            )
        except HFValidationError:
            found = None
    try:
        numbers = json.loads(Path(str(found)).read_text(encoding="utf-8"))
        known = CONFIG_MAPPING[numbers["model_type"]]()
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"model={model['name']} has no model.config, and model.path={model['path']} is no "
            "folder with a config.json that transformers knows (nor in the hub's cache): give "
            "such a folder by model.path=FOLDER, or choose a model of smezo ls models."
        ) from None
    own = {name: value for name, value in numbers.items() if hasattr(known, name)}
    return dict(model) | {"config": {**own, "model_type": numbers["model_type"]}}


def _build(node: Mapping[str, Any], dtype: str, adapter: Mapping[str, Any] | None) -> Any:
    from smezo_cli.models.adapter import attach
    from smezo_cli.models.architecture import build_meta

    model: Any = build_meta({**node, "dtype": dtype})
    model.config.use_cache = False
    if adapter is not None:
        attach(model, adapter, seed=0)
    return model.eval()


def bytes_of(tensors: Any) -> int:
    """Return the bytes of these tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)

"""Load the task, model, tokenizer and scorer that the settings name, for every verb."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smezo_cli.config.method_keys import trait
from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError
from smezo_cli.files.fetch import cache_dir
from smezo_cli.machine import process
from smezo_cli.machine.allocator import keep_freed_memory
from smezo_cli.machine.out_of_memory import (
    SHORTER,
    Halving,
    is_out_of_memory,
    refusing_out_of_memory,
)
from smezo_cli.machine.waiting import waiting
from smezo_cli.models.adapter import Adapter, attach
from smezo_cli.models.architecture import check_quantization, num_weights, quiet
from smezo_cli.models.load import load_model
from smezo_cli.models.modalities import freeze_unread
from smezo_cli.models.onednn import is_slow, use_onednn
from smezo_cli.models.quantised import as_numbers, bytes_as_numbers
from smezo_cli.scoring.batching import Found
from smezo_cli.scoring.candidates import Candidates, encode
from smezo_cli.scoring.measured_batching import measure, pick
from smezo_cli.scoring.parts import by_part
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.scoring.tokens import appended, check_rows
from smezo_cli.tasks import Prompt, Row, Task, load_task
from smezo_cli.tasks.base import fingerprint
from smezo_cli.tasks.mixture import Prompts
from smezo_cli.zo.passes import openmp
from smezo_cli.zo.quantised import quantise

_ENCODED_TOGETHER = 64  # rows behind demonstrations
_MEASURED = 24  # rows of which some are scored together and alone


def _unlike(rows: Sequence[Row]) -> list[Row]:
    """Return some short, some middling and some long rows."""
    ordered = sorted(rows, key=lambda row: sum(map(len, (*row.fields.values(), *row.options))))
    few = _MEASURED // 3
    middle = ordered[few:-few][(len(ordered) - 2 * few) // 2 :][:few]
    return [*ordered[:few], *middle, *ordered[max(few, len(ordered) - few) :]]


def _differing(task: Task, known: Mapping[str, str]) -> list[str]:
    return [name for name, was in known.items() if was != fingerprint(getattr(task, name))]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _hold_codes(model: nn.Module, method: Mapping[str, Any]) -> str:
    """Hold linear layers as codes, as the method asks for them; return a line about it."""
    count = quantise(model, method["weight_bits"], method["group_size"])
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return f"  codes   {count} linear layers in {method['weight_bits']} bits: {size / 1e6:.1f} MB"


class Loaded:
    """Hold the task, model and tokenizer that some settings name.

    Args:
        settings: the checked ones.
        device: "cpu", "cuda" or "cuda:N"; one of the devices if the model is spread over several.
        say: receives a line about the data and lines about the model.
        with_rows: False loads no data; then there is no `task` and there are no `prompts`.
        warn: receives a line on threads or parts of torch that are missing, or on memory that is;
            by default `say`.

    Raises:
        UserError: data or model cannot be found, read, or fitted together.
    """

    def __init__(
        self,
        settings: Settings,
        device: str,
        say: Callable[[str], None],
        with_rows: bool = True,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        process.interruptible()  # all that is heavy is imported
        warn = warn or say
        if line := openmp.settle():
            warn(line)
        self.settings = settings
        self._say = say
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        compute = getattr(torch, settings.compute_dtype or settings.dtype)
        if self.device.type == "cpu" and is_slow(compute):
            name = str(compute).removeprefix("torch.")
            mend = "take dtype=float32" if compute == self.dtype else "leave compute_dtype out"
            warn(f"  {name} is many times as slow as float32 on this processor: {mend}")
        check_quantization(settings.model, self.device)
        if with_rows:
            self._load_task(say)
        with refusing_out_of_memory(f"to load model={settings.model['name']}"):
            self._load_model(compute, say, warn)

    def _load_model(
        self, compute: torch.dtype, say: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        settings = self.settings
        with waiting(f"loading {settings.model['name']}"):
            self.model, self.tokenizer = self._read_model(compute)
        total = num_weights(self.model)
        self.of_base: str | None = None  # fingerprint of a model that an adapter changes
        self.adapter: Adapter | None = None
        self._came = {id(tensor) for _, tensor in _tensors(self.model)}
        if (node := settings.method.get("adapter")) is not None:
            self.of_base = self.fingerprint()
            self.adapter = attach(self.model, node, settings.seed, warn)
        casts = torch.autocast(
            self.device.type, compute, enabled=compute != self.dtype, cache_enabled=False
        )
        with casts:  # as losses are computed
            #: modules that text never reads, which are frozen; none with an adapter: it trains none
            self.unread = [] if self.adapter is not None else freeze_unread(self.model)
        #: the entries that the method trains, by tensor, where a mask names them (run/mask.py)
        self.index: dict[str, Tensor] | None = None
        self._heads: dict[str, str] = {}  # demonstrations before every row, by part
        if holds_codes := trait(settings.method, "holds_codes", default=False):
            self.of_base = self.fingerprint()
        codes = _hold_codes(self.model, settings.method) if holds_codes else ""
        if compute == self.dtype:
            use_onednn(self.model, warn)
        keep_freed_memory()
        self.scorer = Scorer(
            self.model,
            self.tokenizer,
            None if compute == self.dtype else compute,
            places_before=self.adapter.num_places if self.adapter else 0,
        )
        self.scorer.halving = {name: Halving(warn) for name in ("scores", "answers")}
        where = f", on {', '.join(sorted({*self.device_map.values()}))}" if self.device_map else ""
        say(f"  model   {settings.model['name']}, {total / 1e6:.1f} M weights{where}")
        if settings.model["family"] == "causal" and (ends := appended(self.tokenizer)):
            words = " ".join(self.tokenizer.convert_ids_to_tokens(ends))
            say(f"  tokenizer  puts {words} behind a text: left out, for the model goes on there")
        if codes:
            say(codes)
        if self.unread:
            say(f"  frozen  {', '.join(self.unread)}: text never reads them")
        if settings.model["attention"] == "auto" and self.attention != "sdpa":
            say(f"  attention={self.attention}, as {type(self.model).__name__} has no sdpa")
        if getattr(self.model.config, "auto_map", None) and not settings.model["trust_remote_code"]:
            say(
                "  auto_map: the Python files that the model brings are not executed; "
                f"transformers' own {type(self.model).__name__} computes it"
            )

    def _read_model(self, compute: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        try:
            return load_model(
                self.settings.model,
                dtype=self.dtype,
                device=self.device,
                cache=cache_dir(),
                compute_dtype=compute,
            )
        except UserError as error:
            # Whatever the libraries raise over a checkpoint is explained as a fault of its files.
            if error.__cause__ is None or not is_out_of_memory(error.__cause__):
                raise
            raise error.__cause__ from None

    @property
    def device_map(self) -> dict[str, str] | None:
        """Return the device of each module, if the model lies on several; else None."""
        places: Mapping[str, Any] = getattr(self.model, "hf_device_map", None) or {}
        found = {name: str(place) for name, place in places.items()}
        return found if len(set(found.values())) > 1 else None

    @property
    def attention(self) -> str:
        """Return the implementation of attention that the model computes with."""
        return str(self.model.config._attn_implementation)

    def _load_task(self, say: Callable[[str], None]) -> None:
        settings = self.settings
        with waiting(f"reading the data of {settings.task['name']}"):
            self.task = load_task(settings.task, data_seed=settings.data_seed, cache=cache_dir())
        say(
            f"  data    {self.task.source}: {len(self.task.train)} train, "
            f"{len(self.task.dev)} dev, {len(self.task.test)} test"
        )
        for note in self.task.notes:
            say(f"  note    {note}")
        masked = settings.model["family"] == "masked"
        #: prompts that suit the model, of which training chooses one, or one of each part
        self.prompts = self.task.masked if masked else self.task.prompts
        there = by_part(self.prompts)
        if lacking := [name for name in self.task.parts or ("",) if name not in there]:
            kind = "masked" if masked else "causal"
            place = "with a {mask} place" if masked else "without a {mask}"
            raise UserError(
                f"model={settings.model['name']} is {kind}, and task "
                f"{lacking[0] or self.task.name} has no prompt for such models: give task.prompt "
                f"{place} and task.labels."
            )

    def prompt(self, chosen: int | Sequence[int]) -> Prompt | Prompts:
        """Return the prompt of this number, or of these numbers the one of each part."""
        if isinstance(chosen, int):
            return self.prompts[chosen]
        return Prompts({self.prompts[k].part: self.prompts[k] for k in chosen})

    def node_of(self, part: str) -> Mapping[str, Any]:
        """Return the checked task node of a part; "" is that of a single task."""
        task = self.settings.task
        return task["nodes"][part] if part else task

    def differing_rows(self, known: Mapping[str, str], *, may_renumber: bool = True) -> list[str]:
        """Return the names of the splits whose rows do not have the known fingerprints.

        If rows of the user's own file differ, they are read once more, numbered by line as earlier
        versions of smezo did; if that gives the known rows, `task` becomes the task of these.

        Args:
            known: fingerprints by the name of the split.
            may_renumber: False: do not try the earlier numbers.
        """
        found = _differing(self.task, known)
        if found and may_renumber and self.settings.task.get("data"):
            of_before = load_task(
                self.settings.task,
                data_seed=self.settings.data_seed,
                cache=cache_dir(),
                by_line=True,
            )
            if not _differing(of_before, known):
                self.task, found = of_before, []
                self._say("  rows    numbered by line, as the version of smezo did that began here")
        return found

    def demonstrate(self, text: str, part: str = "") -> None:
        """Put a text before every row, of a mixture of one part, that is encoded from now on."""
        self._heads[part] = text
        self.scorer.holds_common = any(self._heads.values())

    def measure_batching(
        self, prompts: Sequence[Prompt], rows: Sequence[Row] | None = None
    ) -> Found:
        """Measure with rows of unlike length which rows may share a forward.

        Args:
            prompts: that the rows may be asked under; of several that are computed in the same
                way, the first is measured.
            rows: from which some are taken; None: all of the task.
        """
        if rows is None:
            rows = [*self.task.train, *self.task.dev, *self.task.test]
        of_rows, found = by_part(rows), Found()
        with (
            waiting("measuring which rows may share a forward"),
            refusing_out_of_memory("for a forward over two rows", SHORTER),
        ):
            for part, of_part in by_part(prompts).items():
                some, ways = _unlike(of_rows.get(part, rows)), set[bool]()
                for prompt in of_part:
                    encoded = self.encode(some, prompt)
                    way = all(row.full != () and row.shares_prefix for row in encoded)
                    if way not in ways:
                        ways.add(way)
                        chosen = pick(encoded, self.scorer.most_tokens)
                        found = found.stricter(measure(self.scorer, chosen))
        return found

    def set_probe(self, saved: Mapping[str, Tensor], where: Path) -> None:
        """Score by a saved probe from now on.

        Raises:
            UserError: the tensors are no probe, or that of another model.
        """
        model: Any = self.model  # without types
        probe, head = dict(saved), model.get_output_embeddings()
        shapes = {name: tuple(t.shape) for name, t in probe.items()}
        classes = shapes.get("bias", ())
        if shapes != {"bias": classes, "weight": (*classes, head.weight.shape[1])}:
            raise UserError(f"{where}/checkpoint is of another model; start over: if_exists=fresh.")
        self.scorer.probe = probe

    def as_it_came(self) -> AbstractContextManager[None]:
        """Switch off the model's adapter, if it has one, inside a context."""
        return nullcontext() if self.adapter is None else self.adapter.off()

    def base_weights(self) -> dict[str, Tensor]:
        """Return the model's weights by name, without those of its adapter."""
        if self.adapter is None:
            return dict(self.model.state_dict())
        return {name: t.detach() for name, t in _tensors(self.model) if id(t) in self._came}

    def fingerprint(self) -> str:
        """Return twelve hex digits of the model: names, shapes, dtypes, 64 weights of each tensor.

        For a model with an adapter, they are those of the model as it came.
        """
        if self.of_base is not None:
            return self.of_base
        digest = hashlib.sha256()
        for name, p in self.model.named_parameters():
            flat = p.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // 64)][:64].float().cpu()
            digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode() + some.numpy().tobytes())
        return digest.hexdigest()[:12]

    def encode(self, rows: Sequence[Row], prompt: Prompt | Prompts) -> list[Candidates]:
        """Return rows as tokens under a prompt, behind the demonstrations if there are any.

        Args:
            rows: of one task; of a mixture, if there is a prompt of each part, part after part.
            prompt: of the task, or of each part.

        Raises:
            UserError: as :func:`smezo_cli.scoring.candidates.encode`; or the model's embedding
                lacks a token.
        """
        if isinstance(prompt, Prompts):
            parts = by_part(rows).items()
            return [c for name, of in parts for c in self.encode(of, prompt.parts[name])]
        part, node = prompt.part, self.node_of(prompt.part)
        prompt = dataclasses.replace(prompt, head=self._heads.get(part, ""))
        # A tokenizer needs a hundred bytes a token while it works, and demonstrations are long.
        size = _ENCODED_TOGETHER if prompt.head else max(1, len(rows))
        encoded = [
            candidates
            for start in range(0, len(rows), size)
            for candidates in encode(
                rows[start : start + size],
                prompt,
                self.tokenizer,
                self.max_length,
                node["kind"],
                node.get("max_new_tokens", 0),
            )
        ]
        if part:
            encoded = [dataclasses.replace(candidates, part=part) for candidates in encoded]
        for row in encoded:
            of_base = row.base.full if row.base is not None else ()
            check_rows(self.tokenizer, self.model, row.id, chain(*row.full, row.context, *of_base))
        return encoded

    @property
    def max_length(self) -> int:
        """Return tokens of the context length that are left for a prompt and its answer."""
        places = self.adapter.num_places if self.adapter else 0
        longest: int = self.settings.model["max_length"]
        return longest - places

    def save(self, folder: Path) -> None:
        """Save the model, or its adapter, and the tokenizer in a new folder."""
        self.model.config.use_cache = True
        saved: Any = self.model  # without types
        with quiet(), waiting(f"writing {folder}"):
            if self.adapter is not None:
                self.adapter.save(folder)
            else:
                with as_numbers(self.model):
                    saved.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def saved_bytes(self) -> int:
        """Return bytes that :meth:`save` writes, without the tokenizer."""
        if self.adapter is not None:
            return self.adapter.saved_bytes
        return bytes_as_numbers(self.model)

    @property
    def loaded_by(self) -> str:
        """Return a line on what loads the folder that :meth:`save` writes."""
        if self.adapter is not None:
            return self.adapter.loaded_by
        family = "Masked" if self.settings.model["family"] == "masked" else "Causal"
        return f"transformers loads it: AutoModelFor{family}LM.from_pretrained(FOLDER)"

    def set_weights(self, saved: Mapping[str, Tensor], where: Path) -> None:
        """Copy trained tensors into the model.

        Raises:
            UserError: they are of another model.
        """
        named: dict[str, Any] = dict(self.model.named_parameters())
        if any(n not in named or named[n].shape != t.shape for n, t in saved.items()):
            raise UserError(f"{where}/checkpoint is of another model; start over: if_exists=fresh.")
        with torch.no_grad():
            for name, tensor in saved.items():
                named[name].copy_(tensor)

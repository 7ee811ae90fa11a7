"""What a run works on, made from its settings: task, model, scorer; shared by all verbs."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError
from smezo_cli.files.fetch import cache_dir
from smezo_cli.machine import process
from smezo_cli.machine.allocator import keep_freed_memory
from smezo_cli.models.adapter import Adapter, attach
from smezo_cli.models.architecture import check_quantization, num_weights, quiet
from smezo_cli.models.load import load_model
from smezo_cli.models.modalities import freeze_unread
from smezo_cli.models.onednn import use_onednn
from smezo_cli.scoring.batching import Found, measure, pick
from smezo_cli.scoring.candidates import Candidates, encode
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.scoring.tokens import appended, check_rows
from smezo_cli.tasks import Prompt, Row, Task, load_task
from smezo_cli.tasks.base import fingerprint
from smezo_cli.zo.passes import openmp

_ENCODED_TOGETHER = 64  # rows behind demonstrations
_MEASURED = 24  # rows of which some are scored together and alone


def _differing(task: Task, known: Mapping[str, str]) -> list[str]:
    return [name for name, was in known.items() if was != fingerprint(getattr(task, name))]


class Loaded:
    """Task, model and tokenizer of some settings, loaded.

    Args:
        settings: checked ones.
        device: "cpu", "cuda" or "cuda:N"; of a model that is spread one of its devices.
        say: receives a line about the data and one about the model.
        with_rows: False leaves the data alone; then there is no `task` and there are no `prompts`.
        warn: receives a line where this machine's threads are not what torch takes them for, or
            not all of torch can be used; default `say`.

    Raises:
        UserError: data or model cannot be had, read, or fitted together.
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
        check_quantization(settings.model, self.device)
        if with_rows:
            self._load_task(say)
        self.model, self.tokenizer = load_model(
            settings.model,
            dtype=self.dtype,
            device=self.device,
            cache=cache_dir(),
            compute_dtype=compute,
        )
        total = num_weights(self.model)
        self._of_base: str | None = None  # its fingerprint, where it is changed by an adapter
        self.adapter: Adapter | None = None
        if (node := settings.method.get("adapter")) is not None:
            self._of_base = self.fingerprint()
            self.adapter = attach(self.model, node, settings.seed)
        #: modules that text never reads, which are frozen; of a model with an adapter all is
        casts = torch.autocast(
            self.device.type, compute, enabled=compute != self.dtype, cache_enabled=False
        )
        with casts:  # as losses are computed
            self.unread = [] if self.adapter is not None else freeze_unread(self.model)
        self._head = ""  # before the context of every row: demonstrations
        if compute == self.dtype:
            use_onednn(self.model, warn)
        keep_freed_memory()
        self.scorer = Scorer(
            self.model,
            self.tokenizer,
            None if compute == self.dtype else compute,
            places_before=self.adapter.num_places if self.adapter else 0,
        )
        where = f", on {', '.join(sorted({*self.device_map.values()}))}" if self.device_map else ""
        say(f"  model   {settings.model['name']}, {total / 1e6:.1f} M weights{where}")
        if settings.model["family"] == "causal" and (ends := appended(self.tokenizer)):
            words = " ".join(self.tokenizer.convert_ids_to_tokens(ends))
            say(f"  tokenizer  puts {words} behind a text: left out, for the model goes on there")
        if self.unread:
            say(f"  frozen  {', '.join(self.unread)}: text never reads them")
        if settings.model["attention"] == "auto" and self.attention != "sdpa":
            say(f"  attention={self.attention}, as {type(self.model).__name__} has no sdpa")
        if getattr(self.model.config, "auto_map", None) and not settings.model["trust_remote_code"]:
            say(
                "  auto_map: the Python files that the model brings are not executed; "
                f"transformers' own {type(self.model).__name__} computes it"
            )

    @property
    def device_map(self) -> dict[str, str] | None:
        """The device of each module, where the model lies on several."""
        places: Mapping[str, Any] = getattr(self.model, "hf_device_map", None) or {}
        found = {name: str(place) for name, place in places.items()}
        return found if len(set(found.values())) > 1 else None

    @property
    def attention(self) -> str:
        """The implementation of attention that the model computes with."""
        return str(self.model.config._attn_implementation)

    def _load_task(self, say: Callable[[str], None]) -> None:
        settings = self.settings
        self.task = load_task(settings.task, data_seed=settings.data_seed, cache=cache_dir())
        say(
            f"  data    {self.task.source}: {len(self.task.train)} train, "
            f"{len(self.task.dev)} dev, {len(self.task.test)} test"
        )
        for note in self.task.notes:
            say(f"  note    {note}")
        masked = settings.model["family"] == "masked"
        #: those that the model can be asked, of which training chooses one
        self.prompts = self.task.masked if masked else self.task.prompts
        if not self.prompts:
            kind = "masked" if masked else "causal"
            place = "with a {mask} place" if masked else "without a {mask}"
            raise UserError(
                f"model={settings.model['name']} is {kind}, and task {self.task.name} has no "
                f"prompt for such models: give task.prompt {place} and task.labels."
            )

    def differing_rows(self, known: Mapping[str, str], *, may_renumber: bool = True) -> list[str]:
        """Names of the splits whose rows are not those with the known fingerprints, by split.

        Where rows of the user's own file differ, they are read once more, numbered by line as
        earlier versions of smezo did; if that gives the known rows, `task` becomes the one of them
        (not without `may_renumber`).
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

    def demonstrate(self, text: str) -> None:
        """Let what is encoded from now on stand behind a text, which all rows have in common."""
        self._head = text
        self.scorer.holds_common = bool(text)

    def measure_batching(
        self, prompts: Sequence[Prompt], rows: Sequence[Row] | None = None
    ) -> Found:
        """Return which rows may share forwards, measured with some of unlike length.

        Args:
            prompts: that they may be asked under; of those whose rows are computed in one way the
                first is measured.
            rows: of which some are taken; None: all of the task.
        """
        if rows is None:
            rows = [*self.task.train, *self.task.dev, *self.task.test]
        ordered = sorted(rows, key=lambda row: sum(map(len, (*row.fields.values(), *row.options))))
        few = _MEASURED // 3
        middle = ordered[few:-few][(len(ordered) - 2 * few) // 2 :][:few]
        some = [*ordered[:few], *middle, *ordered[max(few, len(ordered) - few) :]]
        found, ways = Found(), set[bool]()
        for prompt in prompts:
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
            UserError: it is of another model, or none.
        """
        model: Any = self.model  # without types
        probe, head = dict(saved), model.get_output_embeddings()
        shapes = {name: tuple(t.shape) for name, t in probe.items()}
        classes = shapes.get("bias", ())
        if shapes != {"bias": classes, "weight": (*classes, head.weight.shape[1])}:
            raise UserError(f"{where}/checkpoint is of another model; start over: if_exists=fresh.")
        self.scorer.probe = probe

    def as_it_came(self) -> AbstractContextManager[None]:
        """Inside, the model computes without its adapter, if it has one."""
        return nullcontext() if self.adapter is None else self.adapter.off()

    def fingerprint(self) -> str:
        """Twelve hex digits of the model as it is: names, shapes, dtypes, 64 weights of each.

        Of a model with an adapter, those of the model as it came.
        """
        if self._of_base is not None:
            return self._of_base
        digest = hashlib.sha256()
        for name, p in self.model.named_parameters():
            flat = p.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // 64)][:64].float().cpu()
            digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode() + some.numpy().tobytes())
        return digest.hexdigest()[:12]

    def encode(self, rows: Sequence[Row], prompt: Prompt) -> list[Candidates]:
        """Rows as tokens under a prompt, behind what is demonstrated.

        Raises:
            UserError: as :func:`smezo_cli.scoring.candidates.encode`; a token that the model has no
            row for.
        """
        prompt = dataclasses.replace(prompt, head=self._head)
        # A tokenizer takes a hundred bytes a token while it works, and demonstrations are long.
        size = _ENCODED_TOGETHER if self._head else max(1, len(rows))
        encoded = [
            candidates
            for start in range(0, len(rows), size)
            for candidates in encode(
                rows[start : start + size],
                prompt,
                self.tokenizer,
                self.max_length,
                self.settings.task["kind"],
                self.settings.task.get("max_new_tokens", 0),
            )
        ]
        for row in encoded:
            of_base = row.base.full if row.base is not None else ()
            check_rows(self.tokenizer, self.model, row.id, chain(*row.full, row.context, *of_base))
        return encoded

    @property
    def max_length(self) -> int:
        """Tokens of the window that are left for a prompt and its answer."""
        places = self.adapter.num_places if self.adapter else 0
        longest: int = self.settings.model["max_length"]
        return longest - places

    def save(self, folder: Path) -> None:
        """Model (or what its adapter makes of it) and tokenizer in a new folder."""
        self.model.config.use_cache = True
        saved: Any = self.model  # without types
        with quiet():
            if self.adapter is not None:
                self.adapter.save(folder)
            else:
                saved.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def saved_bytes(self) -> int:
        """Of what :meth:`save` writes, without the tokenizer."""
        if self.adapter is not None:
            return self.adapter.saved_bytes
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def loaded_by(self) -> str:
        """What loads the folder that :meth:`save` writes."""
        if self.adapter is not None:
            return self.adapter.loaded_by
        family = "Masked" if self.settings.model["family"] == "masked" else "Causal"
        return f"transformers loads it: AutoModelFor{family}LM.from_pretrained(FOLDER)"

    def set_weights(self, saved: Mapping[str, Tensor], where: Path) -> None:
        """Put trained tensors into the model.

        Raises:
            UserError: they are of another model.
        """
        named: dict[str, Any] = dict(self.model.named_parameters())
        if any(n not in named or named[n].shape != t.shape for n, t in saved.items()):
            raise UserError(f"{where}/checkpoint is of another model; start over: if_exists=fresh.")
        with torch.no_grad():
            for name, tensor in saved.items():
                named[name].copy_(tensor)

"""Plan a run: memory, time and disk of each of its stages."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smezo_cli.config.digest import is_extensible
from smezo_cli.config.fixed import is_frozen
from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError
from smezo_cli.plan.trace import (
    KEPT,
    NUM_OPTIONS,
    NUMBA,
    OPTION_TOKENS,
    PACKED,
    RUNTIME_CPU,
    RUNTIME_CUDA,
    THRESHOLD,
    Keep,
    PadOnly,
    _build,
    architecture,
    bytes_of,
    trace,
)


@dataclass(frozen=True)
class Plan:
    """What a run needs; sizes in bytes.

    Attributes:
        run: task, model, method, dtypes and device in words.
        device: "cpu" or "cuda".
        resident: what is held all the time, by name.
        phases: what each stage of the run needs on top of it; they do not overlap.
        host: memory of the host that a run on CUDA needs; 0 on a CPU.
        disk: kept in the run folder at the end.
        disk_peak: kept there while a checkpoint is written.
        work: forwards, rows and tokens, by name; tokens are an upper bound.
        capacity: memory of the device.
        assumptions: sentences on what the settings do not say.
        seconds: of a step ("step") as it was measured, "rows" and "tokens" of its batch, and of all
            "steps" if theirs are like that; None where nothing was measured.
    """

    run: str
    device: str
    resident: Mapping[str, int]
    phases: Mapping[str, int]
    host: int
    disk: int
    disk_peak: int
    work: Mapping[str, int]
    capacity: int
    assumptions: Sequence[str]
    seconds: Mapping[str, float] | None = None

    @property
    def peak(self) -> int:
        """Most bytes on the device at any time."""
        return sum(self.resident.values()) + max(self.phases.values())

    @property
    def fits(self) -> bool:
        """Is the peak within the capacity?"""
        return self.peak <= self.capacity

    def record(self) -> dict[str, Any]:
        """All of it in plain values."""
        return dataclasses.asdict(self) | {"peak": self.peak, "fits": self.fits}

    def text(self) -> str:
        """All of it for a reader, in GB of 10^9 bytes."""
        gb = 1e9
        lines = [self.run, "  held all the time"]
        lines += [f"    {name:<44}{size / gb:10.3f} GB" for name, size in self.resident.items()]
        lines.append("  on top of it, one after the other")
        lines += [f"    {name:<44}{size / gb:10.3f} GB" for name, size in self.phases.items()]
        verdict = "it fits" if self.fits else "it does NOT fit"
        lines.append(
            f"  {'peak':<46}{self.peak / gb:10.3f} GB of {self.capacity / gb:.1f} GB: {verdict}"
        )
        if self.host:
            lines.append(f"  {'memory of the host':<46}{self.host / gb:10.3f} GB")
        lines.append(
            f"  {'disk':<46}{self.disk / gb:10.3f} GB ({self.disk_peak / gb:.3f} GB while saving)"
        )
        lines += [f"  {name:<46}{number:10,}" for name, number in self.work.items()]
        if self.seconds is not None:
            step, rows, tokens = (self.seconds[key] for key in ("step", "rows", "tokens"))
            what = f"a step of {rows} rows of {tokens} tokens, measured"
            lines.append(f"  {what:<46}{step:10.3f} s")
            lines.append(
                f"  {'all steps, if theirs are like that':<46}{self.seconds['steps']:10.0f} s"
            )
        lines.append("  assumed")
        lines += [f"    {sentence}" for sentence in self.assumptions]
        return "\n".join(lines)


# --- the plan ---------------------------------------------------------------------------------


def plan(settings: Settings, *, capacity: int | None = None, tokens: int | None = None) -> Plan:
    """What the run of these settings will need.

    Args:
        settings: checked ones.
        capacity: bytes of the device; None asks this machine, which then must have the device.
        tokens: longest row; None takes ``model.max_length``.

    Raises:
        UserError: an architecture or a device that is not known here, a method without a plan.
    """
    if settings.model["device_map"] is not None:
        raise UserError(
            "smezo plan knows one device: leave model.device_map out, and compare the weights that "
            "it says with the memory of all GPUs."
        )
    device = _device(settings, capacity)
    return _Planner(settings, device, capacity or _capacity(settings, device), tokens).plan()


def _device(settings: Settings, capacity: int | None) -> str:
    from smezo_cli.machine.device import choose_device

    if settings.device.startswith("cuda"):
        if capacity is None:
            try:
                choose_device(settings.device)
            except UserError as error:
                raise UserError(
                    f"device={settings.device}: this machine has no such device; say what memory "
                    "it has, such as --memory 80GB."
                ) from error
        return "cuda"
    return choose_device(settings.device)


def _capacity(settings: Settings, device: str) -> int:
    if device == "cuda":
        import torch

        name = settings.device if settings.device.startswith("cuda") else "cuda"
        return int(torch.cuda.get_device_properties(torch.device(name)).total_memory)
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:  # a container may be given less
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        limit = "max"
    return min(size, int(limit)) if limit.isdecimal() else size


class _Planner:
    """Builds the model without weights and goes through the stages of a run with it."""

    def __init__(self, settings: Settings, device: str, capacity: int, tokens: int | None) -> None:
        import torch

        self.settings, self.device, self.capacity = settings, device, capacity
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.compute: torch.dtype = getattr(torch, settings.compute_dtype or settings.dtype)
        node = architecture(settings.model)
        adapter = settings.method.get("adapter")
        self.model = _build(node, settings.dtype, adapter)
        # Of another compute dtype the activations are of a model that has it for its weights.
        self.traced = self.model
        if self.compute != self.dtype:
            self.traced = _build(node, settings.compute_dtype or settings.dtype, adapter)
        window = settings.model["max_length"]
        self.eval_tokens = tokens or window
        # Demonstrations leave half of the window at least.
        self.demonstrated = 0
        if number := settings.method.get("num_demonstrations", 0):
            row = min(self.eval_tokens, window // 2)
            self.demonstrated = min(number * row, window - row)
            self.eval_tokens = row + self.demonstrated
        self.shows = self.demonstrated > 0
        longest = settings.task["max_train_tokens"] or self.eval_tokens
        self.train_tokens = max(4, min(longest, self.eval_tokens))
        self.kind: str = settings.task["kind"]
        self.packed = self._packed() if settings.model["quantization"] else []
        if self.packed and device != "cuda":
            raise UserError(
                "model.quantization=4bit needs CUDA: plan it with device=cuda --memory SIZE, or "
                "leave model.quantization out."
            )

    def plan(self) -> Plan:
        """Resident memory, stages, disk, work."""
        from smezo_cli.config.build import build
        from smezo_cli.methods.first_order import FirstOrder
        from smezo_cli.zo.optimizer import ZeroOrder

        s = self.settings
        frozen = is_frozen(s.method)
        # On the meta device there are no thresholds to find and no passes to compile.
        node = s.method | ({"sparsity": 0.0} if "sparsity" in s.method else {})
        runtime = {"model": self.model, "seed": s.seed, "backend": "eager", "check": False}
        method = build(node, "method", **runtime)
        self.trained = {} if frozen else dict(method.trained)
        cuda = self.device == "cuda"
        resident = {
            "CUDA" if cuda else "Python and its libraries": RUNTIME_CUDA if cuda else RUNTIME_CPU,
            "weights": bytes_of(self.model.parameters())
            - bytes_of(self.packed)
            + math.ceil(PACKED * sum(p.numel() for p in self.packed)),
            "buffers": bytes_of(self.model.buffers()),
        }
        phases = self._evaluation()
        if isinstance(method, ZeroOrder):
            more, own, per_step = self._zeroth_order(method.num_scalars, method.keeps_state)
        elif isinstance(method, FirstOrder):
            more, own, per_step = self._first_order()
        elif frozen:
            more, own, per_step = {}, {}, 0
        else:
            raise UserError(
                f"method={s.method['name']} has no plan: smezo plan knows the methods that are "
                f"made of {ZeroOrder.__name__} or {FirstOrder.__name__}."
            )
        trained = bytes_of(self.trained.values())
        # What is held for the method is not there yet.
        phases["loading"] = max(0, self._loading() - sum(more.values()))
        if self.device == "cpu" and self.trained:
            own["best weights read back"] = max(bytes_of([p]) for p in self.trained.values())
        state = more.get("optimizer state", 0)
        disk, disk_peak = self._disk(trained, state, isinstance(method, ZeroOrder))
        fits = "l2" in s.method  # a probe
        looks = math.ceil(s.steps / s.eval_every) + (self.shows or fits)
        work = {
            "forwards of training": s.steps * per_step,
            "rows in them": s.steps * per_step * s.batch_size,
            "tokens in them, at most": s.steps * per_step * s.batch_size * self.train_tokens,
            "looks at dev": looks,
        }
        if fits and s.task["num_train"]:
            work["rows whose hidden states are computed"] = s.task["num_train"]
        num_dev = s.task["num_dev"]
        if (each := s.task.get("num_per_class")) and "classes" in s.task.get("source", {}):
            num_dev = each * len(s.task["source"]["classes"])
        if num_dev and s.task["num_test"]:
            tests = 1 if frozen and not (self.shows or fits) else 2
            work["rows in evaluations, at most"] = (
                looks + len(s.task.get("prompts") or [0])
            ) * num_dev + tests * s.task["num_test"]
        return Plan(
            run=f"{s.task['name']} | {s.model['name']} | {s.method['name']} | {s.dtype} weights, "
            f"{s.compute_dtype or s.dtype} compute | {self.device}",
            device=self.device,
            resident={name: size for name, size in (resident | more).items() if size},
            phases={name: size for name, size in (phases | own).items() if size},
            # Weights pass through the host when they are loaded, and what is saved when it is.
            host=RUNTIME_CPU + max(resident["weights"], trained + state) if cuda else 0,
            disk=disk,
            disk_peak=disk_peak,
            work=work,
            capacity=self.capacity,
            assumptions=list(self._assumptions()),
        )

    # --- stages -------------------------------------------------------------------------------

    def _loading(self) -> int:
        """The file, where its numbers are of another dtype than the weights.

        Of the same one the weights are the mapped file itself.
        """
        import torch

        model = self.settings.model
        ours = model["package"] is not None or model["tiny"] is not None  # float32 both
        if not ours or self.dtype == torch.float32 or self.device == "cuda":
            return 0
        return sum(p.numel() * 4 for p in self.model.parameters())

    def _evaluation(self) -> dict[str, int]:
        """A batch of evaluation, and of a generation task the answers."""
        import torch

        from smezo_cli.scoring import scorer as scoring

        limit = scoring.EVAL_TOKENS if self.device == "cpu" else scoring.EVAL_TOKENS_GPU
        own = self.eval_tokens - self.demonstrated
        row = self._rows(1, own)[0]
        count = max(1, limit // row.num_tokens)
        rows = self._rows(count, own)
        if self.shows:
            rows = [self._shown(row, 1 + i % 2) for i, row in enumerate(rows * 2)]
        scorer = self._scorer()
        scorer.holds_common = self.shows

        def evaluate() -> None:
            with scorer.holding(rows):
                scorer.scores(rows[:count])

        with torch.no_grad():
            found = {"evaluation": self._count(evaluate)[0]}
            if self.kind == "generation":
                found["answers"] = self._count(self._answers)[0]
        return {name: size + self._cast() for name, size in found.items()}

    def _shown(self, row: Any, first: int) -> Any:
        """The row behind demonstrations; rows of another first token of their own differ there."""
        head = (0,) * self.demonstrated
        full = tuple((*head, first, *ids[1:]) for ids in row.full)
        return dataclasses.replace(row, full=full, context=full[0] if row.context else ())

    def _answers(self) -> None:
        """Prompts of the longest rows, and the last token of their answers."""
        import torch

        from smezo_cli.scoring.scorer import EVAL_ANSWERS

        length = self.eval_tokens - 1
        past = None
        for width in (length, 1):
            ids = torch.zeros(EVAL_ANSWERS, width, dtype=torch.int64, device="meta")
            more: dict[str, Any] = {} if past is None else {"past_key_values": past}
            output = self.traced(input_ids=ids, use_cache=True, logits_to_keep=1, **more)
            past = output.past_key_values

    def _zeroth_order(
        self, num_queries: int, keeps_state: bool
    ) -> tuple[dict[str, int], dict[str, int], int]:
        """Held, by stage, and forwards a step."""
        import torch

        from smezo_cli.zo.selections import masks

        s = self.settings
        weights = sum(p.numel() for p in self.trained.values())
        largest = max(p.numel() for p in self.trained.values())
        # MeZO-Adam's moments, two of float32.
        held = {"optimizer state": 8 * weights} if keeps_state else {}
        found: dict[str, int] = {}
        compiled, keeps = self._passes(weights, num_queries)
        if compiled and self.device == "cpu":
            held["Numba"] = NUMBA
        batch = self._micro_batch()
        # Thresholds chunk by chunk, unless every weight is active; the share of active weights by
        # the mask of one tensor.
        chunk = min(masks._CHUNK, largest) if s.sparsity else 0
        found["thresholds"] = max(THRESHOLD * chunk, largest)
        if s.method["executor"] == "in_place":
            scorer = self._scorer()
            with torch.no_grad():
                alone = self._count(lambda: self._objective(scorer, batch))[0] + self._cast()
            # eps m z and the mask of every weight; one tensor in float32, moved and chosen.
            found["step"] = weights * (KEPT + 4) + max(alone, 12 * largest)
            return held, found, 2 * num_queries
        # Plus and minus live at once where both are evaluated module by module.
        twice = 2 if s.method["executor"] in ("lockstep", "auto") else 1
        step, copies = self._probed(batch)
        held["scratch of probes"] = twice * copies
        found["step"] = twice * step + (KEPT * weights if keeps else 0)
        pair, _ = self._probed(batch[:2])
        # An exact copy of some tensors is put back after they were perturbed in place.
        saved = self._checked_together()
        found["self-check"] = saved * (self.dtype.itemsize + (KEPT if keeps else 0)) + pair
        return held, found, 2 * num_queries

    def _micro_batch(self) -> Sequence[Any]:
        """The most rows that are computed together."""
        s = self.settings
        return self._rows(min(s.batch_size, s.micro_batch_size or s.batch_size), self.train_tokens)

    def _objective(self, scorer: Any, batch: Sequence[Any]) -> None:
        """The forwards of a step's objective, without what follows from their logits on a CPU."""
        objective = self.settings.method.get("objective", "loss")
        if objective == "loss":
            scorer.loss(batch)
        elif objective == "f1":
            self._answers()
        else:
            scorer.scores(batch)

    def _passes(self, weights: int, num_queries: int) -> tuple[bool, bool]:
        """Are passes compiled, and is the noise of a step kept? As train and zo decide."""
        from smezo_cli.zo.directions import dense
        from smezo_cli.zo.passes import choose

        s = self.settings
        if s.compile != "auto":
            compiled = bool(s.compile)
        elif self.device == "cuda":
            compiled = True
        else:
            total = sum(p.numel() for p in self.model.parameters())
            compiled = total * s.steps >= choose.WORTH_IT and weights >= dense.WORTH_COMPILING
        plain = num_queries == 1 and s.method.get("rounding") != "stochastic"
        room = self.capacity > 10 * weights
        return compiled, plain and room and not compiled and self.device == "cpu"

    def _probed(self, batch: Sequence[Any]) -> tuple[int, int]:
        """Bytes that a loss under a probe needs for a while, and the scratch that the probe keeps.

        The probe of the run itself goes through the model.
        """
        import torch

        from smezo_cli.zo.probe import FunctionalProbe

        named = dict(self.traced.named_parameters())
        probe = FunctionalProbe(self.traced, [named[name] for name in self.trained])
        scorer = self._scorer()

        def measure() -> None:
            with probe.at(Keep()):
                self._objective(scorer, batch)

        with torch.no_grad():
            peak, left = self._count(measure)
        # The scratch has the dtype of the weights.
        return peak - left + self._cast(), left * self.dtype.itemsize // self.compute.itemsize

    def _checked_together(self) -> int:
        """Weights that the self-check moves together, at most."""
        from smezo_cli.zo.probe import FunctionalProbe
        from smezo_cli.zo.reached import checked_together, kinds_to_check

        names = {id(parameter): name for name, parameter in self.trained.items()}
        total = sum(p.numel() for p in self.trained.values())
        probe = FunctionalProbe(self.model, list(self.trained.values()))
        kinds = kinds_to_check(probe, names, total)
        sizes = [[int(self.trained[n].numel()) for n in chosen] for chosen in kinds.values()]
        return max(sum(of[part]) for of in sizes for part in checked_together(of, total))

    def _first_order(self) -> tuple[dict[str, int], dict[str, int], int]:
        """Held, by stage, and forwards a step."""
        import torch

        from smezo_cli.config.build import build

        batch = self._micro_batch()
        scorer = self._scorer()
        named = dict(self.traced.named_parameters())
        for name, parameter in named.items():
            parameter.requires_grad_(name in self.trained)
        gradients = sum(p.numel() for p in self.trained.values()) * self.compute.itemsize

        def forward_and_backward() -> None:
            scorer.loss(batch).backward()

        self.traced.train()
        found, _ = self._count(forward_and_backward)
        for parameter in named.values():
            parameter.grad = None
        if self.compute != self.dtype:
            # Gradients are of the weights' dtype; the cast weights stay until they are read back.
            found += gradients * self.dtype.itemsize // self.compute.itemsize
        parameters = list(self.trained.values())
        optimizer = build(self.settings.method["optimizer"], "method.optimizer", params=parameters)
        for group in optimizer.param_groups:
            if self.device == "cuda" and "foreach" in group and group["foreach"] is None:
                group["foreach"] = True  # torch's own choice there
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        step, _ = trace([*parameters, *(p.grad for p in parameters)], optimizer.step)
        state = bytes_of(
            value
            for of_one in optimizer.state.values()
            for value in of_one.values()
            if isinstance(value, torch.Tensor)
        )
        held = {"optimizer state": state}
        stages = {
            "forward and backward, gradients included": found,
            "update, gradients included": step - state + bytes_of(parameters),
            # On a CPU the allocator still holds the freed gradients then, in pieces (measured).
            "checkpoint: a copy of the optimizer state": state
            + (bytes_of(parameters) if self.device == "cpu" else 0),
        }
        return held, stages, 1

    def _disk(self, trained: int, state: int, is_recorded: bool) -> tuple[int, int]:
        """At the end, and while a checkpoint is written: the best, the last and the new one.

        Of a run whose steps are recorded: what it goes back to, and the new one; of one with a
        state of its own the best weights, too, and the state with each whole checkpoint.
        """
        s = self.settings
        looks = math.ceil(s.steps / s.eval_every)
        goes_on = is_extensible(s.lr_schedule)
        if is_recorded:
            whole = s.steps // s.full_save_every
            if state:
                best = looks if s.keep == "all" else 1
                kept = best * trained + goes_on * min(1, whole) * (trained + state)
                return kept, (best + 1) * trained + min(2, whole) * (trained + state)
            if s.keep == "all":
                return (looks + whole) * trained, (looks + whole) * trained
            few = 2 if goes_on and whole else 1
            before = min(2, whole + (s.keep == "best"))
            return few * trained, (before + 1) * trained
        if s.keep == "all":
            kept = looks * trained
            return kept + goes_on * state, kept + 2 * state
        few = 1 if s.keep == "last" or not goes_on else 2
        return min(few, looks) * trained + goes_on * state, min(3, looks) * trained + 2 * state

    # --- what runs ----------------------------------------------------------------------------

    def _scorer(self) -> Any:
        from smezo_cli.scoring.scorer import Scorer

        return Scorer(self.traced, PadOnly())

    def _packed(self) -> list[Any]:
        """The weights that are in 4 bits: of linear layers, but for the head and the adapter."""
        import torch

        head = self.model.get_output_embeddings()
        return [
            module.weight
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head and "lora_" not in name
        ]

    def _cast(self) -> int:
        """Of another compute dtype, or of 4 bits, the copy of one weight at a time."""
        if self.packed:
            widest: int = max(p.numel() for p in self.packed)
            return widest * self.compute.itemsize
        if self.compute == self.dtype:
            return 0
        largest: int = max(p.numel() for p in self.model.parameters())
        return largest * self.compute.itemsize

    def _count(self, call: Callable[[], Any]) -> tuple[int, int]:
        """Most bytes beside the model's that live during ``call``, and those that stay."""
        return trace([*self.traced.parameters(), *self.traced.buffers()], call)

    def _rows(self, count: int, tokens: int) -> list[Any]:
        """Rows of so many tokens as the task's kind has them."""
        from smezo_cli.scoring.candidates import Candidates

        ids = (1,) * tokens
        if self.settings.model["family"] == "masked":
            row = Candidates((ids, ids), (1, 1), 0, False, mask=1, context=ids)
        elif self.kind == "classification":
            row = Candidates((ids, (*ids[:-1], 2)), (1, 1), 0, False)
        else:
            generates = self.kind == "generation"
            option = self.settings.task["max_new_tokens"] if generates else OPTION_TOKENS
            option = max(1, min(option, tokens - 2))
            sequences = [(*ids[: tokens - option], *(k,) * option) for k in range(self._options())]
            row = Candidates(
                tuple(sequences), (option,) * len(sequences), 0, False, self.kind, context=ids
            )
        if self.settings.task.get("sfc"):
            row = dataclasses.replace(row, base=self._base(row))
        return [row] * count

    @staticmethod
    def _base(row: Any) -> Any:
        """The candidates behind a domain-conditional prompt of one token, or of a mask alone."""
        sequences = tuple((1, *ids[-n:]) for ids, n in zip(row.full, row.num_option, strict=True))
        masked = {} if row.mask is None else {"mask": 1, "context": sequences[0]}
        return dataclasses.replace(row, full=sequences, label=-1, **masked)

    def _options(self) -> int:
        if self.kind == "generation":
            return 1
        task = self.settings.task
        named = task.get("options") or task.get("source", {}).get("options")
        return len(named) if isinstance(named, list) else NUM_OPTIONS

    def _assumptions(self) -> Iterator[str]:
        s = self.settings
        training = "" if is_frozen(s.method) else f"{self.train_tokens} tokens in training and "
        yield (
            f"rows of {training}{self.eval_tokens} {'' if training else 'tokens '}in evaluation "
            "(task.max_train_tokens, model.max_length, --tokens)"
        )
        if self.kind == "classification":
            yield "label words of one token each"
        if self.shows:
            own = self.eval_tokens - self.demonstrated
            yield f"{self.demonstrated} tokens of demonstrations before rows of {own}"
        if s.task.get("sfc"):
            yield (
                "a domain-conditional prompt of one token (task.sfc=true), scored in the same "
                "forwards; its rows and tokens are not counted"
            )
        if self.kind == "choice":
            yield f"{self._options()} options of {OPTION_TOKENS} tokens each"
        if self.kind == "generation":
            yield f"answers of task.max_new_tokens={s.task['max_new_tokens']} tokens"
        if s.method.get("objective") == "f1":
            yield "a forward of training generates an answer a row, whose tokens are not counted"
        if self.packed:
            yield "linear layers but the head are in 4 bits, with double quantisation; not measured"
        if self.device == "cuda":
            yield f"CUDA itself takes {RUNTIME_CUDA / 1e9:.2f} GB, and nothing is fragmented"
        else:
            yield "the runtime is that of a small task's rows, measured on Linux"

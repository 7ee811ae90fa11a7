"""Plan a run: memory, time and disk of each of its stages."""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smezo_cli.config.digest import is_extensible
from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError
from smezo_cli.kinds import MIXTURE
from smezo_cli.plan import kept_inputs, losses, masks, stages
from smezo_cli.plan.dry_run import OPTION_TOKENS, DryRun, dry_run
from smezo_cli.plan.trace import bytes_of

ROWS = "rows in them"  # in the forwards of training

TRAINED = "weights trained, those of the adapter"
KEPT = "inputs of the first trained block"

_CUDA = "CUDA"

# Resident memory of a run on a CPU less its weights and tensors (Linux, torch 2.13, transformers
# 5.23, datasets 5.2): libraries, the embedded task's rows and tokens, and what an allocator keeps.
_RUNTIME_CPU = 620_000_000

# Not measured: what CUDA, its libraries and their workspaces usually take on the device.
_RUNTIME_CUDA = 1 << 29

# Nobody knows before a forward which block it is; all are of one size.
_DOMINANT = 1

# Bytes of a weight in NF4: of 64 weights a scale of a byte, of 256 such scales one of float32.
_PACKED = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Plan:
    """Hold everything that a run needs; sizes are in bytes.

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
        """Return the most bytes on the device at any time."""
        return sum(self.resident.values()) + max(self.phases.values())

    @property
    def step_peak(self) -> int:
        """Return the most bytes while a step is made; on CUDA those of tensors alone."""
        held = sum(size for name, size in self.resident.items() if name != _CUDA)
        return held + max(self.phases.get(name, 0) for name in (stages.STEP, stages.TAIL))

    @property
    def fits(self) -> bool:
        """Say whether the peak is within the capacity."""
        return self.peak <= self.capacity

    def record(self) -> dict[str, Any]:
        """Return all of it in plain values."""
        return dataclasses.asdict(self) | {"peak": self.peak, "fits": self.fits}

    def text(self) -> str:
        """Return all of it as lines of text, in GB of 10^9 bytes."""
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
    """Return what the run of these settings will need.

    Args:
        settings: checked ones.
        capacity: bytes of the device; None asks this machine, which then must have the device.
        tokens: longest row; None takes ``model.max_length``.

    Raises:
        UserError: an architecture or a device that is not known here, a method without a plan.
    """
    if settings.task["kind"] == MIXTURE:
        return _of_mixture(settings, capacity, tokens)
    return _of_task(settings, capacity, tokens)[0]


def _of_task(
    settings: Settings, capacity: int | None, tokens: int | None
) -> tuple[Plan, kept_inputs.Kept | None]:
    """Return the plan of a task, and what is kept of its rows."""
    if settings.model["device_map"] is not None:
        raise UserError(
            "smezo plan knows one device: leave model.device_map out, and compare the weights that "
            "it says with the memory of all GPUs."
        )
    if settings.method.get("layers") == "dominant":
        method = {**settings.method, "layers": [_DOMINANT]}
        one, kept = _of_task(dataclasses.replace(settings, method=method), capacity, tokens)
        said = (
            *one.assumptions,
            f"the dominant layer is found by the run: it is block {_DOMINANT}",
        )
        return dataclasses.replace(one, assumptions=said), kept
    device = _device(settings, capacity)
    capacity = capacity or _capacity(settings, device)
    run = dry_run(settings, device, tokens, stages.num_demonstrations(settings))
    before = {"loading": _loading(run)}  # anything is held for the method, or weights are codes
    loaded, index = bytes_of(run.model.parameters()), None
    if masks.needs_mask(run):
        before["mask"] = stages.making_a_mask(run)
        index = masks.places(run)
        masks.hold_codes(run, index)
    method = stages.method_on_meta(run, index=index)
    resident = _resident(run)
    phases = stages.evaluation(run)
    needs = stages.training(run, method, capacity)
    if index is not None:
        needs.held["mask"] = masks.bytes_of_mask(index)
    less = loaded - bytes_of(run.model.parameters()) - sum(needs.held.values())
    phases |= {name: max(0, size + less) for name, size in before.items()}
    phases |= needs.stages
    trained = method.trained.values() if stages.takes_steps(method) else []
    if device == "cpu" and trained:
        phases["best weights read back"] = max(bytes_of([p]) for p in trained)
    saved, state = bytes_of(trained), needs.held.get("optimizer state", 0)
    host = in_file = 0
    disk, disk_peak = _disk(settings, saved, state, by_steps=stages.records_steps(method))
    kept = kept_inputs.kept(run, method)
    if device == "cuda":
        # Weights pass through the host when they are loaded, and tensors when they are saved.
        host = _RUNTIME_CPU + max(resident["weights"], saved + state)
        host += kept.most or 0 if kept is not None else 0
    elif kept is not None:
        held = kept.in_memory(capacity - sum(resident.values()) - sum(needs.held.values()))
        needs.held[KEPT], in_file = held, (kept.most or 0) - held
    if index is not None:
        disk, disk_peak = (size + masks.bytes_on_disk(run, index) for size in (disk, disk_peak))
    s = settings
    found = Plan(
        run=f"{s.task['name']} | {s.model['name']} | {s.method['name']} | {s.dtype} weights, "
        f"{s.compute_dtype or s.dtype} compute | {device}",
        device=device,
        resident={name: size for name, size in (resident | needs.held).items() if size},
        phases={name: size for name, size in phases.items() if size},
        host=host,
        disk=disk,
        disk_peak=disk_peak + in_file,
        work=_work(run, method, kept),
        capacity=capacity,
        assumptions=[
            *_assumptions(run, method),
            *([kept.sentence] if kept is not None else []),
        ],
    )
    return found, kept


def _of_mixture(settings: Settings, capacity: int | None, tokens: int | None) -> Plan:
    """Return what the run of a mixture needs: for each thing the most that one of its parts needs.

    A forward has rows of one part alone, of a step as many as are the part's.
    """
    nodes = settings.task["nodes"]
    each = math.ceil(settings.batch_size / len(nodes))

    def part_of(node: dict[str, Any]) -> Settings:
        return dataclasses.replace(settings, task=node, batch_size=each)

    planned = [_of_task(part_of(node), capacity, tokens) for node in nodes.values()]
    parts = [part for part, _ in planned]
    first, first_node = parts[0], next(iter(nodes.values()))
    known = [key for key in first.work if all(key in part.work for part in parts)]
    work = {key: sum(part.work[key] for part in parts) for key in known}
    for key in known:
        if key in ("forwards of training", "evaluations on dev", TRAINED) or key.startswith(
            "blocks"
        ):
            work[key] = first.work[key]
    # A loss has rows of all parts.
    run = dry_run(part_of(first_node), first.device, tokens, stages.num_demonstrations(settings))
    method, longest = stages.method_on_meta(run), run.lengths.training
    if ROWS in work:
        work[ROWS] = _rows_of_training(run, method, settings)[ROWS]
    of_parts = {losses.sentence(method, part_of(node), longest) for node in nodes.values()}
    said = [line for part in parts for line in part.assumptions if line not in of_parts]
    if words := losses.sentence(method, settings, longest):
        said.append(words)
    merged = dataclasses.replace(
        first,
        run=first.run.replace(next(iter(nodes)), f"mixture of {', '.join(nodes)}", 1),
        resident=_most(part.resident for part in parts),
        phases=_most(part.phases for part in parts),
        host=max(part.host for part in parts),
        disk=max(part.disk for part in parts),
        disk_peak=max(part.disk_peak for part in parts),
        work=work,
        assumptions=[
            f"at most {each} rows of a part in a step; of all parts what takes most memory",
            *dict.fromkeys(said),
        ],
    )
    return _with_kept(merged, planned)


def _with_kept(merged: Plan, planned: Sequence[tuple[Plan, kept_inputs.Kept | None]]) -> Plan:
    """Return the plan of a mixture with what is kept of the rows of all its parts in one store."""
    every = [(part, kept) for part, kept in planned if kept is not None]
    if not every:
        return merged
    sizes = [kept.most or 0 for _, kept in every]
    if merged.device == "cuda":
        less = max(part.host - size for (part, _), size in zip(every, sizes, strict=True))
        return dataclasses.replace(merged, host=less + sum(sizes))
    resident = {name: size for name, size in merged.resident.items() if name != KEPT}
    all_of_it = dataclasses.replace(every[0][1], most=sum(sizes))
    held = all_of_it.in_memory(merged.capacity - sum(resident.values()))
    in_files = [
        size - part.resident.get(KEPT, 0) for (part, _), size in zip(every, sizes, strict=True)
    ]
    less = max(part.disk_peak - in_file for (part, _), in_file in zip(every, in_files, strict=True))
    return dataclasses.replace(
        merged,
        resident=resident | ({KEPT: held} if held else {}),
        disk_peak=less + sum(sizes) - held,
    )


def _most(sizes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the largest size of each name."""
    found: dict[str, int] = {}
    for of in sizes:
        for name, size in of.items():
            found[name] = max(size, found.get(name, 0))
    return found


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


# --- memory -----------------------------------------------------------------------------------


def _resident(run: DryRun) -> dict[str, int]:
    """Return what is held whatever the method is."""
    cuda = run.device == "cuda"
    packed = math.ceil(_PACKED * sum(p.numel() for p in run.packed))
    return {
        _CUDA if cuda else "Python and its libraries": _RUNTIME_CUDA if cuda else _RUNTIME_CPU,
        "weights": bytes_of(run.model.parameters()) - bytes_of(run.packed) + packed,
        "buffers": bytes_of(run.model.buffers()),
    }


def _loading(run: DryRun) -> int:
    """Return the bytes of the file, where its numbers are of another dtype than the weights.

    Of the same one the weights are the mapped file itself.
    """
    model = run.settings.model
    ours = model["package"] is not None or model["tiny"] is not None  # float32 both
    if not ours or run.settings.dtype == "float32" or run.device == "cuda":
        return 0
    return sum(p.numel() * 4 for p in run.model.parameters())


# --- disk and work ----------------------------------------------------------------------------


def _disk(s: Settings, trained: int, state: int, *, by_steps: bool) -> tuple[int, int]:
    """Return the bytes at the end, and those while a checkpoint is written.

    While it is written the best, the last and the new one are there. Of a run whose steps are
    recorded: what it goes back to, and the new one; of one with a state of its own the best
    weights, too, and the state with each whole checkpoint.

    Args:
        s: the settings.
        trained: bytes of the tensors that are saved.
        state: bytes of what the steps keep beside them.
        by_steps: the steps are recorded, so that the weights can be made again from them.
    """
    evaluations = math.ceil(s.steps / s.eval_every)
    goes_on = is_extensible(s.lr_schedule)
    if by_steps:
        whole = s.steps // s.full_save_every
        if state:
            best = evaluations if s.keep == "all" else 1
            kept = best * trained + goes_on * min(1, whole) * (trained + state)
            return kept, (best + 1) * trained + min(2, whole) * (trained + state)
        if s.keep == "all":
            return (evaluations + whole) * trained, (evaluations + whole) * trained
        few = 2 if goes_on and whole else 1
        before = min(2, whole + (s.keep == "best"))
        return few * trained, (before + 1) * trained
    if s.keep == "all":
        kept = evaluations * trained
        return kept + goes_on * state, kept + 2 * state
    few = 1 if s.keep == "last" or not goes_on else 2
    most = min(3, evaluations) * trained + 2 * state
    return min(few, evaluations) * trained + goes_on * state, most


def _work(run: DryRun, method: Any, kept: kept_inputs.Kept | None) -> dict[str, int]:
    """Return forwards, rows and tokens by name."""
    s, shows = run.settings, run.lengths.demonstrated > 0
    forwards = losses.forwards_of_training(method, s.steps)
    fits = stages.fits_probe(method)
    evaluations = math.ceil(s.steps / s.eval_every) + (shows or fits)
    work = {
        "forwards of training": forwards,
        **_rows_of_training(run, method, s),
        **({f"blocks in each, of {kept.blocks}": kept.blocks - kept.first} if kept else {}),
        "evaluations on dev": evaluations,
    }
    if s.method.get("adapter") is not None:
        work[TRAINED] = sum(p.numel() for p in method.trained.values())
    if fits and s.task["num_train"]:
        work["rows whose hidden states are computed"] = s.task["num_train"]
    num_dev = s.task["num_dev"]
    if (each := s.task.get("num_per_class")) and "classes" in s.task.get("source", {}):
        num_dev = each * len(s.task["source"]["classes"])
    if num_dev and s.task["num_test"]:
        tests = 2 if stages.takes_steps(method) or shows or fits else 1
        prompts = len(s.task.get("prompts") or [0])
        rows = (evaluations + prompts) * num_dev + tests * s.task["num_test"]
        work["rows in evaluations, at most"] = rows
    return work


def _rows_of_training(run: DryRun, method: Any, settings: Settings) -> dict[str, int]:
    """Return the rows and tokens in all forwards of the training; nothing where not known."""
    found = losses.rows_and_tokens(method, settings, run.lengths.training)
    if found is None:
        return {}
    return dict(zip((ROWS, "tokens in them, at most"), found, strict=True))


def _assumptions(run: DryRun, method: Any) -> Iterator[str]:
    s, lengths = run.settings, run.lengths
    training = ""
    if stages.takes_steps(method):
        training = f"{lengths.training} tokens in training and "
    yield (
        f"rows of {training}{lengths.evaluation} {'' if training else 'tokens '}in evaluation "
        "(task.max_train_tokens, model.max_length, --tokens)"
    )
    if run.kind == "classification":
        yield "label words of one token each"
    if lengths.demonstrated:
        yield f"{lengths.demonstrated} tokens of demonstrations before rows of {lengths.own}"
    if s.task.get("sfc"):
        yield (
            "a domain-conditional prompt of one token (task.sfc=true), scored in the same "
            "forwards; its rows and tokens are not counted"
        )
    if run.kind == "choice":
        yield f"{run.num_options} options of {OPTION_TOKENS} tokens each"
    if run.kind == "generation":
        yield f"answers of task.max_new_tokens={s.task['max_new_tokens']} tokens"
    if stages.takes_steps(method) and (words := losses.sentence(method, s, lengths.training)):
        yield words
    if stages.objective_of(s) == "f1":
        yield "a forward of training generates an answer a row, whose tokens are not counted"
    if masks.needs_mask(run):
        yield "the mask takes the same share of every tensor"
    if run.packed:
        yield "linear layers but the head are in 4 bits, with double quantisation; not measured"
    if run.device == "cuda":
        yield f"CUDA itself takes {_RUNTIME_CUDA / 1e9:.2f} GB, and nothing is fragmented"
    else:
        yield "the runtime is that of a small task's rows, measured on Linux"

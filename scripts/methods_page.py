"""Writes docs/guide/methods.md from the methods themselves: their YAML, docstrings, parts, timings.

.venv/bin/python scripts/methods_page.py

It also writes the numbers that `smezo show method NAME` prints, smezo_cli/cli/method_costs.json,
and the list of methods in README.md.

Seconds and peaks come from docs/results/methods-bench*.json, which `smezo bench --json` writes;
of a method that is in two of them, from the later one by name.
"""

import functools
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smezo_cli.cli.ls import parts
from smezo_cli.cli.method_notes import COSTS, about, against_mezo
from smezo_cli.config.build import build, target_of
from smezo_cli.config.compose import compose
from smezo_cli.config.fixed import plain
from smezo_cli.config.method_keys import trait

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "guide" / "methods.md"
README = ROOT / "README.md"
LIST = re.compile(r"(?<=\| kind \| methods \|\n\|---\|---\|\n)(\|.*\n)*")
BENCH = sorted((ROOT / "docs" / "results").glob("methods-bench*.json"))
HEAD = """# Methods

Every zeroth-order method of `smezo ls methods`, as `smezo train method=NAME` runs it.
`smezo show method NAME` prints its settings and where each value comes from.

* **State** is what a method keeps between steps beside the weights, the places of a mask among it,
  in bytes a weight that it may train (on a network of two layers of 64 x 96 in float32; the pool
  of `pezo` is as large on any other).
* **Forwards** are losses measured in a step (of the first eight steps where these differ, else the
  least and the most of a run): over the batch, over all rows where `mezo_svrg` sets an anchor, over
  fewer rows in the search of `bf_ssd`.
* **Cost** is the time of a step over the time of its forwards, and **peak** the memory of a step
  over that of a forward, by `smezo bench` ({measured}). Empty: not measured, as for methods on
  adapters, which train another model.
* **Since** is the version of smezo that brought the method.

At the end of each section stands what is in print of the method against MeZO, in points of
accuracy unless it says otherwise, and what [the arena](../results/arena.md) has measured.

| method | what it does | state | forwards | cost | peak | source | since |
|---|---|---|---|---|---|---|---|
"""
FOOT = """
## What each step does

{sections}
## Names that are no method here

* **SubZero for images** ([2502.19673](https://arxiv.org/abs/2502.19673)) shares only the name with
  `subzero`: it personalises pictures without training any weights.
* **Tensor-train training of optical PINNs** ([2502.12384](https://arxiv.org/abs/2502.12384)) is a
  script on the library, not a method for language models:
  [docs/results/pinn.md](../results/pinn.md).
* **ElasticZO-INT8** ([2501.04287](https://arxiv.org/abs/2501.04287)), the variant in integers, is
  a class of the library for small networks, not a method for language models:
  `smezo_cli.methods.elasticzo_int8.ElasticZOInt8`. Its weights take one byte each, and no float is
  computed in a step.

## Methods that are not built

Their rule is not in full in what we read, and a guess under a paper's name helps nobody:

* **BSZO** ([2601.01452](https://arxiv.org/abs/2601.01452)): a Kalman filter over the gradient in k
  directions; how its noise follows the residuals is not in what we read. Public code exists
  (<https://github.com/AeonianQuill/BSZO>) and was not read.
* **LOREN** ([2511.07971](https://arxiv.org/abs/2511.07971)): a low-rank, block-diagonal curvature
  as the covariance of the directions; how it is estimated is not in what we read. Public code
  exists (<https://github.com/hseung88/loren>) and was not read.
* **CurvZO** ([2603.21725](https://arxiv.org/abs/2603.21725)): weights are sampled by scores of
  curvature; the recursion of the scores and the budget rule are not in what we read. Public code
  exists, another team's (<https://github.com/EkkoXy/AIM-ZO>), and was not read.
* **ZO-Act** ([2607.01125](https://arxiv.org/abs/2607.01125)): only its abstract was readable.

This page is written by `scripts/methods_page.py`.
"""


class Two(nn.Module):
    """Two layers with a number in their names, as the blocks of a language model have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 96), nn.Linear(96, 64)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def names() -> list[str]:
    """Return the zeroth-order methods of conf/method/."""
    files = sorted((ROOT / "conf" / "method").glob("*.yaml"))
    return [file.stem for file in files if trait(node_of(file.stem), "compares_losses", False)]


@functools.cache
def settings_of(name: str) -> dict[str, Any]:
    """Return the settings of a run by a method."""
    # Of no recipe, so that the values are the method's own.
    return dict(plain(compose([f"method={name}", "model=tiny-llama", "task=toy"])))


def node_of(name: str) -> dict[str, Any]:
    """Return the settings of a method."""
    return dict(settings_of(name)["method"])


def headline(name: str) -> str:
    """Return what the first comment of a method's YAML says of it, without its source."""
    lines = (ROOT / "conf" / "method" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    text = " ".join(line.removeprefix("#").strip() for line in lines[1:4] if line.startswith("#"))
    sentence = re.split(r"(?<=[.])\s", text)[0]
    return re.sub(r"\s*\(arXiv [^)]*\)", "", sentence)


def made(name: str) -> Any:
    """Return the method for a small network, with a mask of it where the method takes one."""
    node = {key: value for key, value in node_of(name).items() if key != "adapter"}
    more = {"project": ["*"]} if "project" in node else {}  # no tensor here has keys or values
    model, index = Two(), None
    if trait(node, "needs_mask", default=False):
        kind: Any = target_of(node, "method")
        loss = functools.partial(model, torch.linspace(-1, 1, 64)[None])
        index = kind.choose(model, dict(model.named_parameters()), {"": [loss]}, node)
    node |= more | {"eps": 1e-3}
    return build(node, "method", model=model, index=index, seed=0, check=False)


def state(method: Any) -> str:
    """Return the bytes that a method keeps for a weight that it may train."""
    return f"{(method.state_bytes + method.mask_bytes) / method.num_weights:.3g}"


def forwards(method: Any, steps: int) -> str:
    """Return the forwards of a step of so many: of the first eight, or the least and the most."""
    found = [method.forwards(step) for step in range(steps)]
    if len(set(found[:8])) > 1:
        return ", ".join(map(str, found[:8]))
    least, most = min(found), max(found)
    return str(least) if least == most else f"{least} to {most}"


def source(name: str) -> str:
    """Return where to read the paper that a method's YAML names first: a URL, or ""."""
    text = (ROOT / "conf" / "method" / f"{name}.yaml").read_text(encoding="utf-8")
    if papers := re.findall(r"arXiv (\d{4}\.\d{5})", text):
        return f"https://arxiv.org/abs/{papers[0]}"
    return next((f"https://{code}" for code in re.findall(r"github\.com/[\w/-]+", text)), "")


def since(name: str) -> str:
    """Return the first version whose part of the changelog names the method."""
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (\S+).*$", log, flags=re.M)[1:]
    versions = list(zip(parts[::2], parts[1::2], strict=True))
    for version, text in reversed(versions):
        if re.search(rf"`(method=)?{name}`", text):
            return version
    return ""


def shares_its_class(name: str) -> bool:
    """Return whether a method is the class of another one, with settings of its own."""
    text = (ROOT / "conf" / "method" / f"{name}.yaml").read_text(encoding="utf-8")
    return "_target_:" not in text


def formula(cls: type) -> Iterator[str]:
    """Yield the docstring of the class up to its arguments, formulas as blocks of code."""
    text = about(cls.__doc__ or "")
    for block in text.split("\n\n"):
        if block.startswith("    "):
            yield "```\n" + textwrap.dedent(block) + "\n```"
        else:  # a paragraph, or the items of a list
            yield "\n".join(" ".join(part.split()) for part in re.split(r"\n(?=\* )", block))


def measured() -> Mapping[str, Any]:
    """Return the timings of all files, or nothing where there are none.

    Raises:
        ValueError: two files are of different settings.
    """
    found: dict[str, Any] = {}
    for file in BENCH:
        one = json.loads(file.read_text(encoding="utf-8"))
        for key in ("ratio_to_its_forwards", "peak_over_forward"):
            found.setdefault(key, {}).update(one[key])
        size, cores = f"{one['batch_size']} x {one['length']}", one["machine"]["cpus"]
        about = f"{one['model']}, {size} tokens, {one['dtype']}, {cores} CPU cores"
        if found.setdefault("about", about) != about:
            raise ValueError(f"{file.name} is of {about}, and others of {found['about']}")
    return found


def costs() -> dict[str, Any]:
    """Return what the table says of every method, as `smezo show method` reads it."""
    bench = measured()
    rows = {}
    for name in names():
        method = made(name)
        rows[name] = {
            "forwards": forwards(method, settings_of(name)["steps"]),
            "state": state(method),
            "cost": bench.get("ratio_to_its_forwards", {}).get(name),
            "peak": bench.get("peak_over_forward", {}).get(name),
            "source": source(name),
        }
    return {"measured": bench.get("about", "nothing is measured yet"), "methods": rows}


def page(found: Mapping[str, Any]) -> str:
    """Return the whole page, with the numbers of :func:`costs`."""
    rows, sections = [], []
    for name, known in found["methods"].items():
        paper, named = known["source"], known["source"].split("/")[-1]
        cells = [
            *(f"`{name}`", headline(name), known["state"], known["forwards"]),
            *("" if x is None else f"{x:.2f}" for x in (known["cost"], known["peak"])),
            *(f"[{named}]({paper})" if paper else "", since(name)),
        ]
        rows.append(f"| {' | '.join(cells)} |")
        cls = target_of(node_of(name), "method")
        compared = "".join(f"* {line}\n" for line in against_mezo(name))
        own = [headline(name)] if shares_its_class(name) else []
        words = "\n\n".join([*own, *formula(cls)])
        sections.append(f"### {name}\n\n{words}\n\n{compared}")
    return (
        HEAD.format(measured=found["measured"])
        + "\n".join(rows)
        + "\n"
        + FOOT.format(sections="\n".join(sections))
    )


def readme() -> str:
    """Return README.md with its list of methods, by kind, written anew."""
    files = {file.stem: file for file in sorted((ROOT / "conf" / "method").glob("*.yaml"))}
    rows = [
        f"| {title.removeprefix('methods, ')} | {', '.join(f'`{name}`' for name in found)} |\n"
        for title, found in parts("methods", files)
    ]
    return LIST.sub("".join(rows), README.read_text(encoding="utf-8"), count=1)


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    now = costs()
    PAGE.write_text(page(now), encoding="utf-8")
    COSTS.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")

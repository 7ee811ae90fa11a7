"""conf/experiment: each grid composes, fits a model of its kind, and trains."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from smezo_cli import train
from smezo_cli.cli.verbs import main
from smezo_cli.config.compose import grid
from smezo_cli.config.composer import Composer
from smezo_cli.config.fixed import CONF_DIR, is_frozen, plain
from smezo_cli.models.architecture import build_meta
from smezo_cli.words import quoted

FOLDER = CONF_DIR / "experiment"
NAMES = sorted(f.relative_to(FOLDER).with_suffix("").as_posix() for f in FOLDER.rglob("*.yaml"))
NAMES.remove("search")  # is no grid: test_search.py
BY_COMMAND = "small/mezo"  # the one that is run as a user runs it
TWINS = {
    node["config"]["model_type"]: file.stem
    for file in (CONF_DIR / "model").glob("tiny-*.yaml")
    for node in [plain(OmegaConf.load(file))]  # type: ignore[arg-type]  # a mapping
}
SMALL = ["batch_size=4", "eval_every=2", "device=cpu", "task.prompt=0"]
ROWS = ["task=toy", "task.num_train=16", "task.num_dev=4", "task.num_test=4"]
MASKED = ["task.prompt='{text}. It was {mask} .'", "task.labels=[terrible,great]"]


def line_of(name: str) -> list[str]:
    """What follows `smezo train` in the comment at the top: the command of the experiment."""
    (line,) = [
        line for line in (FOLDER / f"{name}.yaml").read_text().splitlines()
        if line.startswith("# smezo train ")
    ]  # fmt: skip
    words = line.removeprefix("# smezo train ").split()
    assert words[0] == f"experiment={name}"
    return words


def swept_in(name: str) -> dict[str, list[str]]:
    node: Any = OmegaConf.load(FOLDER / f"{name}.yaml")
    params = OmegaConf.select(node, "hydra.sweeper.params") or {}  # a bed has no grid of its own
    return {k: str(v).split(",") for k, v in params.items()}


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_composes_fits_its_model_and_runs_two_steps(
    name: str, one_thread: None, tmp_path: Path
) -> None:
    """The first point of its grid: on the meta device as it is, then with the twin of its model."""
    words = line_of(name)
    first = [f"{key}={values[0]}" for key, values in swept_in(name).items()]
    with Composer(None) as composer:
        cfg, swept = grid([*words, *first], composer)
    assert not swept or set(swept) == {"seed"}
    node = plain(cfg)["model"]
    net = build_meta(node)
    assert all(p.is_meta for p in net.parameters())

    prompt = MASKED if node.get("family") == "masked" else []
    twin = f"model={TWINS[net.config.model_type]}"
    rows = ROWS
    if plain(cfg)["method"].get("objective") == "f1":  # of generated answers
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(f'{{"question": "{i}", "answer": "{i}"}}\n' for i in range(40)))
        rows = ["task=generation", f"task.data={data}", 'task.prompt="{question} is"', *ROWS[1:]]
        rows.append("task.max_new_tokens=2")
    frozen = is_frozen(plain(cfg)["method"])
    steps = [] if frozen else ["steps=2"]
    # The outputs of a random twin have no outliers, so that none of its blocks is dominant.
    dominant = plain(cfg)["method"].get("layers") == "dominant"
    fewer = ["method.layers=0"] if dominant else []
    if plain(cfg)["method"].get("num_queries", 1) > 16:  # as in test_every_method.py: 100 losses
        fewer.append("method.num_queries=4")
    given = [*first, twin, *rows, *prompt, *fewer, "seed=13", *steps, f"runs_dir={tmp_path}"]
    small = SMALL[2:] if frozen else SMALL
    # The last blocks of a deep model, whose inputs a test need not leave to others.
    if plain(cfg)["method"].get("layers") == "28-29":
        given += ["model.config.num_hidden_layers=30", "cache_inputs=false"]
    # A later word wins: a batch of the grid is as the grid has it.
    last = {word.partition("=")[0]: word for word in [words[0], *small, *given]}
    if name == BY_COMMAND:
        assert main(["train", *last.values()]) == 0
        (file,) = tmp_path.rglob("result.json")
        result = json.loads(file.read_text())
    else:  # the same, without Hydra's sweeper, which composes five times more
        with Composer(None) as composer:
            small_cfg = composer.compose([quoted(word) for word in last.values()])
        result = train.run(small_cfg)
    assert (result["status"], result["step"], result["seed"]) == ("done", 0 if frozen else 2, 13)
    method = next((w[7:] for w in first if w.startswith("method=")), plain(cfg)["method"]["name"])
    assert result["method"] == method


def test_a_seed_of_k_rows_a_class_draws_the_rows() -> None:
    """The seeds of MeZO's Table 18 are those of its splits, in the search and after it."""
    names = [name for name in NAMES if "roberta" in name]
    assert names
    with Composer(None) as composer:
        for name in names:
            cfg, _ = grid(line_of(name), composer)
            assert plain(cfg)["data_seed"] == 13
            OmegaConf.update(cfg, "seed", 87)
            assert plain(cfg)["data_seed"] == 87

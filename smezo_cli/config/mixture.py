"""Expand and check the parts of a mixture: each is a task, with settings of its own if it has any.

An entry of `task.parts` is the name of a task, or a mapping whose `task` is such a name and whose
other keys are settings of that task: `[sst2,{task: rte, data_dir: PATH}]`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from smezo_cli.config.fixed import CONF_DIR, load_yaml
from smezo_cli.config.groups import MIXTURE_COUNTS, checked_group, task_keys
from smezo_cli.errors import UserError, near
from smezo_cli.kinds import MIXTURE, PART_KINDS
from smezo_cli.zo.ranges import shown


def part_nodes(parts: object) -> dict[str, Any]:
    """Return the task node of each part by name, as `${task_parts:...}` in conf/task/mixture.yaml.

    A part that cannot be read is left out: :func:`checked_mixture` says why.
    """
    plain = OmegaConf.to_container(parts) if OmegaConf.is_config(parts) else parts
    found = {}
    for part in plain if isinstance(plain, list) else []:
        try:
            node = _node(part)
        except UserError:
            continue
        found[str(node.get("name"))] = node
    return found


def single_tasks(task: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the nodes of the parts of a mixture; of any other task its own node."""
    return list(task["nodes"].values()) if task["kind"] == MIXTURE else [task]


def checked_mixture(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return the node of a mixture with the checked nodes of its parts.

    Raises:
        UserError: a part that is none, or that does not fit.
    """
    parts, nodes = task["parts"], task["nodes"]
    if not isinstance(parts, list) or not parts:
        raise UserError(
            f"task.parts={shown(parts)}: it must be a list of tasks, for example "
            "task.parts=[sst2,rte]."
        )
    if not isinstance(nodes, Mapping) or len(nodes) != len(parts):
        names = [str(_node(part).get("name")) for part in parts]
        twice = next((name for name in names if names.count(name) > 1), names[0])
        raise UserError(
            f"task.parts has {twice} twice: give one of them a name of its own, such as "
            f"{{task: {twice}, name: {twice}-b}}."
        )
    if task["weights"] is not None and len(task["weights"]) != len(parts):
        raise UserError(
            f"task.weights={shown(task['weights'])} are {len(task['weights'])} and task.parts are "
            f"{len(parts)}: give one number for each part."
        )
    over = {key: task[key] for key in MIXTURE_COUNTS if task[key] is not None}
    checked = {str(name): _checked(str(name), node, over) for name, node in nodes.items()}
    return {**task, "nodes": checked}


def _checked(name: str, node: object, over: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked node of a part, with the counts that the mixture gives to all."""
    try:
        if not isinstance(node, Mapping) or node.get("name") != name:
            raise UserError("it is no task.")
        if "kind" in node and node["kind"] not in PART_KINDS:
            raise UserError(
                f"it is of kind {node['kind']}, and a mixture takes tasks of kind "
                f"{' and '.join(PART_KINDS)}: leave it out of task.parts."
            )
        return checked_group("task", {**node, **over}, *task_keys(node))
    except UserError as error:
        raise UserError(f"task.parts, {name}: {error}") from error


def _node(part: object) -> dict[str, Any]:
    """Return the task node that an entry of `task.parts` stands for.

    Raises:
        UserError: it stands for none.
    """
    given = part if isinstance(part, Mapping) else {"task": part}
    own = {str(key): value for key, value in given.items() if key != "task"}
    files = sorted((CONF_DIR / "task").glob("*.yaml"))
    names = [file.stem for file in files if file.stem != MIXTURE]
    task = given.get("task")
    if task not in names:
        raise UserError(
            f"task.parts has {shown(part)}, which names no task of smezo{near(str(task), names)}: "
            "give names such as [sst2,rte], or {task: NAME, KEY: VALUE} for settings of a part."
        )
    base = load_yaml(CONF_DIR / "task" / f"{task}.yaml")
    try:
        found: Any = OmegaConf.to_container(
            OmegaConf.merge(base, DictConfig({key: None for key in own}), own), resolve=True
        )
    except OmegaConfBaseException as error:
        raise UserError(f"task.parts has {shown(part)}, which cannot be read.") from error
    return dict(found)

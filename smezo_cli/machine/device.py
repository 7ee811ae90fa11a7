"""Choose the devices that a run uses."""

from collections.abc import Mapping

from smezo_cli.errors import UserError


def choose_device(
    name: str,
    device_map: str | Mapping[str, str] | None = None,
    local_rank: int | None = None,
) -> str:
    """Return the device to use; torch is imported only where the answer needs it.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".
        device_map: a checked ``model.device_map``; beside one, the answer is one of its devices.
        local_rank: of several processes on this machine, each of which gets a CUDA device of its
            own, unless one is named.

    Raises:
        UserError: CUDA was asked for and is not there.
    """
    if device_map is not None:
        return all_devices(device_map)[0]
    if name == "cpu":
        return name
    if name == "auto":
        if not _num_gpus():
            return "cpu"
        name = "cuda"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    count = _num_gpus()
    number = int(name.partition(":")[2] or 0)
    if number >= count:
        way_out = "use device=cpu or device=auto"
        if local_rank is not None:
            way_out = "start fewer ranks, or use device=cpu"
        raise UserError(
            f"device={name}: this machine has {count or 'no'} CUDA device that torch can use; "
            f"{way_out}."
        )
    return name


def all_devices(device_map: str | Mapping[str, str]) -> list[str]:
    """Return every device that a checked ``model.device_map`` may use, in order.

    Raises:
        UserError: a GPU that is not there.
    """
    if not isinstance(device_map, str) and set(device_map.values()) == {"cpu"}:
        return ["cpu"]
    count = _num_gpus()
    if isinstance(device_map, str):
        numbers, what = set(range(count or 1)), device_map
    else:
        numbers = {int(place.partition(":")[2]) for place in device_map.values()}
        what = f"{{...: {max(numbers)}}}"
    if max(numbers) >= count:
        has = f"GPUs 0 to {count - 1}" if count > 1 else "GPU 0 alone" if count else "no GPU"
        raise UserError(
            f"model.device_map={what}: this machine has {has} that torch can use; "
            "name others, or leave model.device_map out."
        )
    return [f"cuda:{number}" for number in sorted(numbers)]


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0

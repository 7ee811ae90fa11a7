"""Which device a run uses."""

from smezo_cli.errors import UserError


def choose_device(name: str, local_rank: int | None = None) -> str:
    """The device to use; torch is imported only where the answer needs it.

    Args:
        name: as a user gives it.
        local_rank: of several processes on this machine, each of which gets a CUDA device of its
            own, unless one is named.

    Raises:
        UserError: CUDA was asked for and is not there.
    """
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        if not torch.cuda.is_available():
            return "cpu"
        name = "cuda"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
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

"""Sparse-MeZO: perturb and update only the small weights of each tensor (arXiv 2402.15751)."""

from smezo_cli.zo.optimizer import ZeroOrder


class SparseMeZO(ZeroOrder):
    """MeZO under a mask; see :class:`smezo_cli.zo.optimizer.ZeroOrder` for the arguments.

    ``mask="small"`` is S-MeZO, ``"random"`` R-MeZO, ``"large"`` the paper's counter-example.
    """

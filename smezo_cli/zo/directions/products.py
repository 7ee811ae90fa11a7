"""Say what a direction of low rank is a product of, kind by kind."""

import math
from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from smezo_cli.zo.directions.frames import GAUSSIAN, UNIT, inner, orthonormal
from smezo_cli.zo.passes.low_rank import Factors, product

Shape = tuple[int, int]

#: The factors of a matrix that stay, in their order: float32, contiguous.
Frames = tuple[Tensor, ...]


class Product(Protocol):
    """Makes a matrix (m, n) of a core, which is drawn for a key, and of frames, which stay."""

    #: the stream of a core, where it is another than the purpose of its key
    core_streams: Mapping[str, str]
    #: the sum of two products is that of the sum of their cores
    adds_cores: bool
    #: frames are drawn once
    stays: bool

    def rank(self, shape: Shape, most: int) -> int:
        """Return the rank of a matrix of this shape, where ``most`` is asked for."""

    def core_shape(self, shape: Shape, rank: int) -> Shape:
        """Return the shape of a core."""

    def num_kept(self, shape: Shape, rank: int) -> int:
        """Return the numbers of the frames."""

    def frames(self, gaussian: Callable[[str, int], Tensor], shape: Shape, rank: int) -> Frames:
        """Return the frames; ``gaussian(stream, n)`` draws float32 (rank, n)."""

    def lifted(
        self,
        frames: Frames,
        core: Tensor,
        shape: Shape,
        rows: Tensor | None,
        multiply: Callable[[Factors], Tensor],
    ) -> Factors:
        """Return the product that a core stands for; of these rows of it alone, if any are named.

        Args:
            frames: of the matrix.
            core: of :meth:`core_shape`.
            shape: of the matrix.
            rows: int64; None: all.
            multiply: gives the product of two thin matrices.
        """

    def carried(self, old: Frames, new: Frames, core: Tensor, shape: Shape) -> Tensor:
        """Return what a core in the old frames stands for, as the new ones show it."""


class UV:
    """Make U V^T of a Gaussian core U (m, r), and V Gaussian (LOZO, arXiv 2410.07698)."""

    core_streams: Mapping[str, str] = {"z": "u"}
    adds_cores, stays = True, False

    def rank(self, shape: Shape, most: int) -> int:
        """See :class:`Product`."""
        return most

    def core_shape(self, shape: Shape, rank: int) -> Shape:
        """See :class:`Product`."""
        return shape[0], rank

    def num_kept(self, shape: Shape, rank: int) -> int:
        """See :class:`Product`."""
        return rank * shape[1]

    def frames(self, gaussian: Callable[[str, int], Tensor], shape: Shape, rank: int) -> Frames:
        """See :class:`Product`: V^T."""
        return (gaussian("v", shape[1]),)

    def lifted(
        self,
        frames: Frames,
        core: Tensor,
        shape: Shape,
        rows: Tensor | None,
        multiply: Callable[[Factors], Tensor],
    ) -> Factors:
        """See :class:`Product`."""
        (right,) = frames
        return Factors(picked(core, rows), right)

    def carried(self, old: Frames, new: Frames, core: Tensor, shape: Shape) -> Tensor:
        """See :class:`Product`: N V_old^T V_new / n."""
        (old_right,), (right,) = old, new
        turn = inner(old_right, right, GAUSSIAN) * (1 / shape[1])
        return product(Factors(core, turn.float()))


class UZV:
    """Make s U Z V^T of a Gaussian core Z (r, r), U and V orthonormal (SubZero, arXiv 2410.08989).

    s = sqrt(m n) / r makes it as long as dense noise, on average.
    """

    core_streams: Mapping[str, str] = {}
    adds_cores, stays = True, False

    def rank(self, shape: Shape, most: int) -> int:
        """See :class:`Product`: there are no more orthonormal columns than rows."""
        return min(most, *shape)

    def core_shape(self, shape: Shape, rank: int) -> Shape:
        """See :class:`Product`."""
        return rank, rank

    def num_kept(self, shape: Shape, rank: int) -> int:
        """See :class:`Product`."""
        return rank * sum(shape)

    def frames(self, gaussian: Callable[[str, int], Tensor], shape: Shape, rank: int) -> Frames:
        """See :class:`Product`: s U and V^T."""
        left, right = (
            orthonormal(gaussian(*side)) for side in (("left", shape[0]), ("right", shape[1]))
        )
        return (left * self.scale(shape, rank)).float().T.contiguous(), right.float()

    def lifted(
        self,
        frames: Frames,
        core: Tensor,
        shape: Shape,
        rows: Tensor | None,
        multiply: Callable[[Factors], Tensor],
    ) -> Factors:
        """See :class:`Product`."""
        left, right = frames
        return Factors(multiply(Factors(picked(left, rows), core)), right)

    def carried(self, old: Frames, new: Frames, core: Tensor, shape: Shape) -> Tensor:
        """See :class:`Product`: U_new^T U_old Z V_old^T V_new, a projection on the new subspace.

        Both have one scale.
        """
        (old_left, old_right), (left, right) = old, new
        shrink = 1 / self.scale(shape, core.shape[0])
        turn = inner(old_right, right, UNIT)
        back = inner(left.T * shrink, old_left.T * shrink, UNIT)
        matrix = product(Factors(back.float(), core))
        return product(Factors(matrix, turn.float()))

    @staticmethod
    def scale(shape: Shape, rank: int) -> float:
        """Return s: how many times longer it makes U Z V^T, which is as long as Z."""
        return math.sqrt(shape[0] * shape[1]) / rank


class PZ:
    """Make P Z of a Gaussian core Z (r, n), P orthonormal (ZO-Muon, arXiv 2602.17155)."""

    core_streams: Mapping[str, str] = {}
    adds_cores, stays = True, False

    def rank(self, shape: Shape, most: int) -> int:
        """See :class:`Product`: there are no more orthonormal columns than rows."""
        return min(most, shape[0])

    def core_shape(self, shape: Shape, rank: int) -> Shape:
        """See :class:`Product`."""
        return rank, shape[1]

    def num_kept(self, shape: Shape, rank: int) -> int:
        """See :class:`Product`."""
        return rank * shape[0]

    def frames(self, gaussian: Callable[[str, int], Tensor], shape: Shape, rank: int) -> Frames:
        """See :class:`Product`: P."""
        return (orthonormal(gaussian("left", shape[0])).float().T.contiguous(),)

    def lifted(
        self,
        frames: Frames,
        core: Tensor,
        shape: Shape,
        rows: Tensor | None,
        multiply: Callable[[Factors], Tensor],
    ) -> Factors:
        """See :class:`Product`."""
        (left,) = frames
        return Factors(picked(left, rows), core)

    def carried(self, old: Frames, new: Frames, core: Tensor, shape: Shape) -> Tensor:
        """See :class:`Product`: P_new^T P_old Z, a projection on the new subspace."""
        (old_left,), (left,) = old, new
        return product(Factors(inner(left.T, old_left.T, UNIT).float(), core))


class CP:
    """Make U diag(tau) V^T / sqrt(r) of a Gaussian core tau (1, r), U and V Gaussian (TeZO).

    arXiv 2501.19057. 1 / sqrt(r) makes it as long as dense noise, on average.
    """

    core_streams: Mapping[str, str] = {}
    adds_cores, stays = True, True

    def rank(self, shape: Shape, most: int) -> int:
        """See :class:`Product`."""
        return most

    def core_shape(self, shape: Shape, rank: int) -> Shape:
        """See :class:`Product`."""
        return 1, rank

    def num_kept(self, shape: Shape, rank: int) -> int:
        """See :class:`Product`."""
        return rank * sum(shape)

    def frames(self, gaussian: Callable[[str, int], Tensor], shape: Shape, rank: int) -> Frames:
        """See :class:`Product`: U / sqrt(r) and V^T."""
        left = gaussian("left", shape[0]) * (1 / math.sqrt(rank))
        return left.T.contiguous(), gaussian("right", shape[1])

    def lifted(
        self,
        frames: Frames,
        core: Tensor,
        shape: Shape,
        rows: Tensor | None,
        multiply: Callable[[Factors], Tensor],
    ) -> Factors:
        """See :class:`Product`."""
        left, right = frames
        return Factors(picked(left, rows) * core, right)

    def carried(self, old: Frames, new: Frames, core: Tensor, shape: Shape) -> Tensor:
        """See :class:`Product`: frames that are drawn once show it as it is."""
        return core


class AB:
    """Make A B^T / sqrt(r) of a Gaussian core: A (m, r) and B^T (r, n) (EGGROLL, arXiv 2511.16652).

    Nothing stays. It is as long as dense noise, on average.
    """

    core_streams: Mapping[str, str] = {}
    adds_cores, stays = False, True

    def rank(self, shape: Shape, most: int) -> int:
        """See :class:`Product`."""
        return most

    def core_shape(self, shape: Shape, rank: int) -> Shape:
        """See :class:`Product`: A, and then B^T."""
        return sum(shape), rank

    def num_kept(self, shape: Shape, rank: int) -> int:
        """See :class:`Product`."""
        return 0

    def frames(self, gaussian: Callable[[str, int], Tensor], shape: Shape, rank: int) -> Frames:
        """See :class:`Product`."""
        return ()

    def lifted(
        self,
        frames: Frames,
        core: Tensor,
        shape: Shape,
        rows: Tensor | None,
        multiply: Callable[[Factors], Tensor],
    ) -> Factors:
        """See :class:`Product`."""
        left, right = core[: shape[0]], core[shape[0] :].reshape(-1, shape[1])
        return Factors(picked(left, rows) * (1 / math.sqrt(core.shape[1])), right)

    def carried(self, old: Frames, new: Frames, core: Tensor, shape: Shape) -> Tensor:
        """See :class:`Product`: what is drawn whole is shown as it is."""
        return core


def picked(matrix: Tensor, rows: Tensor | None) -> Tensor:
    """Return these rows of a matrix; all where none are named."""
    return matrix if rows is None else matrix.index_select(0, rows)


#: What a kind is, by its name.
PRODUCTS: Mapping[str, Product] = {"uv": UV(), "uzv": UZV(), "pz": PZ(), "cp": CP(), "ab": AB()}

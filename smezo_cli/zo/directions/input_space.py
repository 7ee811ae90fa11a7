"""Perturb linear layers in a subspace of what they are given, as a watched forward shows it."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smezo_cli.zo.directions.base import Change
from smezo_cli.zo.directions.factored import Factored, FactoredMover
from smezo_cli.zo.move import Key, Move
from smezo_cli.zo.passes.low_rank import Factors
from smezo_cli.zo.targets import Target


class InputSpace(Factored):
    """Perturb a linear layer's weight W (m, n) along a product, its right factor in a subspace.

    u(key) is left right, and the rows of right lie in the subspace. This has an orthonormal basis
    (K, n), which :meth:`watching` makes from the inputs of the layer. A layer that is not called
    then keeps the basis that it has; the first is drawn from (seed, "basis", 0, 0, name). All
    tensors but such weights are perturbed along dense noise.

    Args:
        model: whose linear layers these are; other classes that compute likewise are not known.
        basis_size: K; of a layer of fewer inputs, as many as these.
        rank: of u(key), at most; no more than a layer has inputs.
    """

    def __init__(self, model: nn.Module, basis_size: int, rank: int = 1) -> None:
        super().__init__("uv", rank, 1)
        self.basis_size = basis_size
        self.noise = self.dense.noise
        #: the layers that own a weight, by its ``id``
        self._layers: dict[int, list[nn.Linear]] = {}
        for module in model.modules():
            if isinstance(module, nn.Linear):
                self._layers.setdefault(id(module.weight), []).append(module)
        #: bases that were made in this step, by the names of the targets
        self.made: dict[str, Tensor] = {}
        #: products of the step, by target and key
        self._known: dict[tuple[str, Key], Factors] = {}

    def product_at(self, target: Target, key: Key) -> Factors:
        """Return u(key) of a linear layer, which probes and the update ask for; kept for a step."""
        known = self._known.get((target.name, key))
        if known is None:
            known = self._known[target.name, key] = self.factors_at(target, key)
        return known

    @abstractmethod
    def factors_at(self, target: Target, key: Key) -> Factors:
        """Return u(key) of a linear layer as a product."""

    @abstractmethod
    def seen(self, target: Target, x: Tensor, found: Any) -> Any:
        """Take in what a layer is given.

        Args:
            target: its weight.
            x: float32 (tokens, n).
            found: what this returned of the tokens before; None: there were none.
        """

    @abstractmethod
    def improved(self, target: Target, found: Any) -> Tensor:
        """Return the basis (K, n) that follows from what a layer was given."""

    def kept(self, target: Target) -> Tensor | None:
        """Return the basis that is kept from the step before; None: there is none."""
        return None

    # --- bases --------------------------------------------------------------------------------

    def basis_of(self, target: Target) -> Tensor:
        """Return the present basis of a layer's inputs: float32 (K, n), of orthonormal rows."""
        if target.name not in self.made:
            kept = self.kept(target)
            if kept is not None:
                return kept
            size, width = self.size_of(target), target.parameter.shape[1]
            first = self.gaussian(target, Key(0, 0, "basis"), size, width)
            self.made[target.name] = orthonormal_rows(first)
        return self.made[target.name]

    def size_of(self, target: Target) -> int:
        """Return K, of a layer."""
        return min(self.basis_size, target.parameter.shape[1])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Make new bases from what linear layers are given inside."""
        found: dict[str, Any] = {}
        targets = [t for t in self.dense.targets if self.shape_of(t) is not None]
        hooks = [
            layer.register_forward_pre_hook(self._hook(target, found))
            for target in targets
            for layer in self._layers[id(target.parameter)]
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for target in targets:
            if target.name in found:
                self.made[target.name] = self.improved(target, found[target.name])
        self._known.clear()

    def _hook(self, target: Target, found: dict[str, Any]) -> Callable[..., None]:
        width = target.parameter.shape[1]

        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().to(target.parameter.device)
            with torch.autocast(x.device.type, enabled=False):
                x = x.reshape(-1, width).float()
                found[target.name] = self.seen(target, x, found.get(target.name))

        return see

    # --- see Factored -------------------------------------------------------------------------

    def shape_of(self, target: Target) -> tuple[int, int] | None:
        """Return the shape of a linear layer's weight; None: it is perturbed densely."""
        if id(target.parameter) not in self._layers or target.index is not None:
            return None
        rows, columns = target.parameter.shape
        return rows, columns

    def thin_rank(self, target: Target) -> int | None:
        """See :class:`Direction`: that of one direction."""
        shape = self.shape_of(target)
        return None if shape is None else min(self.rank, shape[1])

    kept_bytes = 0  # bases that are kept are of the state

    def state_size(self, target: Target) -> int:
        """See :class:`Direction`: of a basis."""
        shape = self.shape_of(target)
        return 0 if shape is None else self.size_of(target) * shape[1]

    def noise_bytes(self, *, compiles: bool, on_cpu: bool, free: int) -> int:
        """See :class:`Direction`; of tensors without bases, and the bases of a step."""
        dense = [t for t in self.dense.targets if self.shape_of(t) is None]
        kept = self.dense.noise_bytes_of(dense, compiles=compiles, on_cpu=on_cpu, free=free)
        return kept + 4 * sum(map(self.state_size, self.dense.targets))

    def begin(self, step: int) -> None:
        """See :class:`Direction`."""
        self.dense.begin(step)
        self.made.clear()
        self._known.clear()

    def end(self) -> None:
        """See :class:`Direction`; bases that were made are those of the step, until the next."""
        self.dense.end()
        self._known.clear()

    def refreshes_at(self, step: int) -> bool:
        """See :class:`Direction`: what is kept is no core."""
        return False

    def mover(self, step: int, move: Move) -> FactoredMover:
        """See :class:`Direction`."""
        return InputMover(self, step, move)

    def change(self, step: int, move: Move, of: Callable[[Target], Change]) -> None:
        """Refuse what is no sum of terms.

        Raises:
            ValueError: always.
        """
        raise ValueError("layers move by sums of directions alone: use the update SGD")

    def identity(self) -> dict[str, Any]:
        """See :class:`Direction`."""
        return {**self.dense.identity(), "direction": "inputs", "basis_size": self.basis_size}


class InputMover(FactoredMover):
    """Writes copies of tensors moved by the terms of one move; see :class:`InputSpace`."""

    def __init__(self, direction: InputSpace, step: int, move: Move) -> None:
        super().__init__(direction, step, move)
        self._space = direction

    def factors(self, target: Target, rows: Tensor | None = None) -> Factors:
        """Return the sum of the terms as a product of one more rank for each rank of a term."""
        terms = self._terms_of(target)
        each = [self._space.product_at(target, term.key) for term in terms]
        left = torch.cat(
            [of.left * term.coefficient for of, term in zip(each, terms, strict=True)], 1
        )
        found = Factors(left, torch.cat([of.right for of in each]))
        return found if rows is None else found.rows(rows)


def orthonormal_rows(rows: Tensor) -> Tensor:
    """Return the orthonormal rows that a QR makes of independent ones (K, n), K at most n.

    Signs are those of Gram and Schmidt, so that a small change of the rows is one of the basis.
    """
    q, r = torch.linalg.qr(rows.T)
    return torch.where(r.diagonal() < 0, -q, q).T.contiguous()


def both_sides(x: Tensor, rows: Tensor) -> Tensor:
    """Return rows X^T X: float32 (K, n), of inputs X (tokens, n)."""
    return (x @ rows.T).T @ x

"""Networks of a few inputs and one output, with hidden matrices in tensor-train form or dense."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smezo_cli.zo.noise import draw, stream_key


class TTLinear(nn.Module):
    """A linear layer whose matrix is a tensor train.

    Its rows are numbered by (o_1, ..., o_k), its columns by (i_1, ..., i_k):

        W[o, i] = core_1[0, o_1, i_1, :] core_2[:, o_2, i_2, :] ... core_k[:, o_k, i_k, 0]

    Args:
        rows: how many values each o has; their product is the number of outputs.
        columns: the same of each i, and of the inputs.
        rank: of the products between two cores.
    """

    def __init__(self, rows: Sequence[int], columns: Sequence[int], rank: int) -> None:
        super().__init__()
        self.rows, self.columns, self.rank = tuple(rows), tuple(columns), rank
        last = len(self.rows) - 1
        for k, (o, i) in enumerate(zip(rows, columns, strict=True)):
            shape = (1 if k == 0 else rank, o, i, 1 if k == last else rank)
            # Parameters of this module, not of a list in it: a probe moves them in its forward.
            self.register_parameter(f"core{k}", nn.Parameter(torch.zeros(shape)))
        self.bias = nn.Parameter(torch.zeros(math.prod(rows)))

    def matrix(self) -> Tensor:
        """Return W (outputs, inputs)."""
        whole: Tensor = self.core0
        for k in range(1, len(self.rows)):
            core: Tensor = getattr(self, f"core{k}")  # a plain tensor while a probe is in place
            (_, o, i, r), (_, p, q, s) = whole.shape, core.shape
            product = whole.reshape(-1, r) @ core.reshape(r, -1)
            whole = product.view(o, i, p, q, s).permute(0, 2, 1, 3, 4).reshape(1, o * p, i * q, s)
        return whole[0, :, :, 0]

    def forward(self, x: Tensor) -> Tensor:
        """Return x (n, inputs) times W, plus the bias."""
        return F.linear(x, self.matrix(), self.bias)


class Network(nn.Module):
    """f(x) (n,) of x (n, D): a dense layer, hidden layers, and a dense output, with tanh between.

    Args:
        inputs: D.
        factors: of the width, such as (4, 4, 2) for 32; a hidden layer has a core for each.
        hidden: how many hidden layers.
        rank: of their tensor trains; None makes them dense.
        seed: of the initial weights.
    """

    def __init__(
        self,
        inputs: int,
        factors: Sequence[int] = (4, 4, 2),
        hidden: int = 1,
        rank: int | None = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        width = math.prod(factors)
        self.first = nn.Linear(inputs, width)
        self.hidden = nn.ModuleList(
            nn.Linear(width, width) if rank is None else TTLinear(factors, factors, rank)
            for _ in range(hidden)
        )
        self.last = nn.Linear(width, 1)
        self._initialize(seed)

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        """Draw the weights from keyed noise, so that matrices have entries of variance 1 / inputs.

        Of a tensor train an entry is a sum of rank^(cores - 1) products of one number a core.
        """
        for name, parameter in self.named_parameters():
            owner = self.get_submodule(name.rpartition(".")[0])
            sd = 0.0 if owner is self.last else 1.0
            if isinstance(owner, nn.Linear) and parameter.ndim == 2:
                sd = 1 / math.sqrt(owner.in_features)
            elif isinstance(owner, TTLinear):
                cores = len(owner.rows)
                variance = 1 / math.prod(owner.columns) / owner.rank ** (cores - 1)
                sd = variance ** (0.5 / cores) if parameter.ndim == 4 else 0.0
            elif owner is not self.first:
                sd = 0.0
            index, key = torch.arange(parameter.numel()), stream_key(seed, "init", name)
            z = draw(index, parameter.numel(), torch.tensor(key), "gaussian")
            parameter.copy_(sd * z.view_as(parameter))

    def forward(self, x: Tensor) -> Tensor:
        """Return f at each point."""
        x = self.first(x).tanh()
        for layer in self.hidden:
            x = layer(x).tanh()
        return self.last(x)[:, 0]

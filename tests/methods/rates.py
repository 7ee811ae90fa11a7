"""How far each row comes down a quadratic: L = |x|^2 / 2 in 30 dimensions, 200 steps at lr 1e-2.

The two tensors have 15 dimensions each and are layers; settings are those of the YAML but
sparsity 0, momentum 0.5, a bound of the curvature of 10, and those of SETTINGS.
"""

from typing import NamedTuple

DIMENSIONS, STEPS, LR = 30, 200, 1e-2

#: Of rows whose noise would not let them come down at this lr, or that take 99 losses a step.
SETTINGS = {"kerzoo": {"num_queries": 8}, "subzero_plus": {"num_queries": 4}}

#: Rows with many losses a step and little noise: the lr times this, and as many fewer steps.
FASTER = {"aim_zo": 4, "bf_ssd": 4, "cubic_newton": 4}


class Rate(NamedTuple):
    """The loss after the steps over the loss before.

    Attributes:
        after: what theory says, or what was measured.
        margin: the loss found may be so many times more, or less.
        why: where the number comes from.
    """

    after: float
    margin: float
    why: str


def estimated(dimensions: int, lr: float = LR, steps: int = STEPS, queries: int = 1) -> float:
    """Return the mean of what Q two-sided queries a step along Gaussian noise leave of |x|^2.

    With E[(z.x)^2 |z|^2] = (d + 2) |x|^2, a step x - lr/Q sum_q (z_q.x) z_q leaves the share
    1 - 2 lr + lr^2 [1 + (d + 1) / Q].
    """
    return float((1 - 2 * lr + lr**2 * (1 + (dimensions + 1) / queries)) ** steps)


# Of one query a step: the logarithm of what 200 steps leave has a standard deviation of
# lr sqrt(8 steps) = 0.4, and lies by 0.1 below that of the mean; that of 3 is 1.1. Half or twice
# the rate would leave five times as much, or a fifth.
_CHANCE = 3.0
_MEZO = Rate(estimated(DIMENSIONS), _CHANCE, "SGD on MeZO's estimate in 30 dimensions")
_GRADIENT = (1 - LR) ** (2 * STEPS)  # of gradient descent
# (r K)^2 has a mean of 6.25; over 8 queries the logarithm has a deviation of 0.43.
_KERNEL = (1 - 2 * LR + LR**2 * (1 + (6.25 * (DIMENSIONS + 2) - 1) / 8)) ** STEPS
# Of the range R of four normals, along x, and twice the square of a normal in 29 dimensions:
# E[R^2] = 5.01 and E[R^2 (R^2 + 58)] = 330. The logarithm has a deviation of 1.
_CONTRAST = (1 - 2 * LR * 5.01 + LR**2 * 330) ** STEPS

RATES = {
    "mezo": _MEZO,
    "mezo_lora": _MEZO,
    "mezo_peft": _MEZO,
    "mezo_prefix": _MEZO,
    "sparse_mezo": _MEZO._replace(why="MeZO at sparsity 0"),
    "sparse_mezo_lora": _MEZO._replace(why="MeZO at sparsity 0"),
    "zo_random_sparsity": _MEZO._replace(why="MeZO at sparsity 0"),
    "lezo": _MEZO._replace(why="MeZO where no layer rests"),
    "mazo": _MEZO._replace(why="MeZO without a mask"),
    "senszoq": _MEZO._replace(why="MeZO without a mask"),
    "lozo": _MEZO._replace(why="MeZO on tensors of one dimension"),
    "tezo": _MEZO._replace(why="MeZO on tensors of one dimension"),
    "subzero": _MEZO._replace(why="MeZO on tensors of one dimension"),
    "subzero_lora": _MEZO._replace(why="MeZO on tensors of one dimension"),
    "quzo": _MEZO._replace(why="MeZO on tensors that are no linear layer's"),
    "qzo": _MEZO._replace(why="MeZO on tensors that are no linear layer's"),
    "dizo": _MEZO._replace(why="MeZO; a projection changes the way from the start by 20% at most"),
    "forward_grad": _MEZO._replace(why="exact derivatives are MeZO's on a quadratic"),
    "zo_conservative": _MEZO._replace(why="steps of lr < 2 / |z|^2 go down, so all are taken"),
    "grzo": _MEZO._replace(why="MeZO where the batch is one row"),
    "agzo": _MEZO._replace(why="MeZO on tensors that are no linear layer's"),
    "adazeta": _MEZO._replace(why="MeZO in two epochs of one query, the first of 20,000 steps"),
    "pezo": _MEZO._replace(why="E[u u^T] is nearly I; consecutive u overlap, which is slower"),
    "hizoo": _MEZO._replace(why="MeZO, as alpha 1e-8 leaves the curvature where it is"),
    "hizoo_l": _MEZO._replace(why="MeZO, as alpha 1e-8 leaves the curvature where it is"),
    "zo_block": Rate(estimated(15), _CHANCE, "MeZO in 15 dimensions, on each of two blocks"),
    "elasticzo": Rate(
        (estimated(15) + _GRADIENT) / 2, _CHANCE, "half by MeZO, half by the gradient at tail_lr"
    ),
    # Four times the lr in a quarter of the steps doubles the deviation to 0.8 / sqrt(l): 0.28.
    "bf_ssd": Rate(
        estimated(DIMENSIONS, 4 * LR, STEPS // 4, 8), 2.3, "8 columns, and whole steps pass"
    ),
    # The same, 0.21. Of 15 directions one is spent on their mean.
    "aim_zo": Rate(
        estimated(DIMENSIONS, 4 * LR, STEPS // 4, 14), 2.0, "15 directions, none of a linear layer"
    ),
    # The logarithm's deviation is 0.4 / 2.
    "p_rge": Rate(estimated(DIMENSIONS, queries=4), 2.0, "the mean of four of MeZO's estimates"),
    "zo_muon": Rate(estimated(DIMENSIONS, queries=4), 2.0, "SGD on four one-sided queries"),
    "mopi": Rate(_GRADIENT, 2.0, "a mean of eight one-sided queries is nearly the gradient"),
    "addax": Rate(_GRADIENT, 1.02, "alpha 1e-3: all but the gradient's step on short rows"),
    "mezo_svrg": Rate(
        estimated(DIMENSIONS, steps=STEPS // 2), _CHANCE, "every other step at a hundredth of lr"
    ),
    "zo_momentum": Rate(
        estimated(DIMENSIONS, lr=2 * LR), _CHANCE**2, "momentum 0.5 goes twice as far; twice 0.4"
    ),
    "kerzoo": Rate(_KERNEL, _CHANCE, "estimates of 6.25 times MeZO's second moment, eight a step"),
    "mezo_gv": Rate(_CONTRAST, _CHANCE**3, "estimates of five times the gradient"),
    "lozo_m": Rate(_GRADIENT, _CHANCE, "a mean of estimates is nearly the gradient"),
    "tezo_m": Rate(_GRADIENT, _CHANCE, "a mean of estimates is nearly the gradient"),
    # Steps that are no multiple of the estimate: measured, with a margin for other noise.
    "mezo_adam": Rate(0.594, 1.5, "measured: steps of about lr an entry, whatever the loss"),
    "tezo_adam": Rate(0.594, 1.5, "MeZO-Adam on tensors of one dimension"),
    "eggroll": Rate(0.0016, 3.0, "measured: steps of one length, down to where they are too long"),
    "zo_sign": Rate(0.694, 1.5, "measured: steps of lr an entry, whatever the loss"),
    "r_adazo": Rate(0.0097, 2.0, "measured: steps that begin 32 lr long an entry, with less noise"),
    "subzero_plus": Rate(0.333, 1.5, "measured: as Adam, on the mean of four estimates"),
    "fzoo": Rate(0.539, 1.2, "measured: steps of about lr in all, whatever the loss"),
    "mezo_mv": Rate(0.6, 1.5, "measured: steps of about lr in all, whatever the loss"),
    "conmezo": Rate(0.04, _CHANCE, "measured: as MeZO, and a little more along the momentum"),
    "zo_adamu": Rate(0.08, _CHANCE, "measured: steps of about lr times the slope an entry"),
    "adamezo": Rate(0.63, 1.5, "measured: steps of about lr an entry, whatever the loss"),
    "helene": Rate(0.15, 2.0, "measured: a curvature of at least 10, and a sum of ten estimates"),
    "zoro_fa": Rate(0.254, 1.5, "measured: of 30 entries those that the first rounds decode"),
    "cubic_newton": Rate(
        0.743, 1.2, "measured: a hundredth of a Newton step in 4 of 30 dimensions, 0.57 at M = 0"
    ),
}


def bounds_of(name: str) -> tuple[float, float, str]:
    """Return between what the loss over the one before must lie, and why.

    A row that has just been added comes down somehow; test_rates.py asks for its rate.
    """
    if name not in RATES:
        return 0.0, 0.7, "no rate is stated yet"
    after, margin, why = RATES[name]
    return after / margin, min(1.0, after * margin), why

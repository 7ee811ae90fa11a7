"""Every method that compares losses measures them as one batch, too, or says why it does not."""

import pytest

from tests.methods.test_every_method import ZEROTH_ORDER, closure_of, made
from tests.zo.test_optimizer import mlp

pytestmark = pytest.mark.usefixtures("one_thread")

# Methods that measure something else, which they name.
REFUSING = {
    "forward_grad": "executor=batched: a derivative is taken in one forward",
    "grzo": "executor=batched: a forward computes each row at a point of its own",
}


@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_points_in_one_batch_give_the_losses_of_their_own_forwards(name: str) -> None:
    if name in REFUSING:
        with pytest.raises(Exception, match=REFUSING[name]):
            made(name, mlp(), executor="batched")
        return
    found = []
    for executor in ("sequential", "batched"):
        model = mlp()
        opt = made(name, model, executor=executor, lr=1e-4, eps=1e-2)
        found.append([opt.step(closure_of(model)) for _ in range(3)])
    for a, b in zip(*found, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4)
        assert b.num_forwards == a.num_forwards

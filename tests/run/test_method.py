"""What a run refuses of a method once its model is loaded."""

import pytest
from torch import nn

from smezo_cli.config.compose import compose
from smezo_cli.config.settings import Settings, check
from smezo_cli.errors import UserError
from smezo_cli.methods.mezo import MeZO
from smezo_cli.methods.zo_block import ZOBlock
from smezo_cli.run.method import refuse_idle_ranks


def settings_of(*words: str) -> Settings:
    return check(compose(["task=toy", "model=tiny-llama", "device=cpu", *words]))


def layers(number: int) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(1, 1) for _ in range(number)])})


@pytest.mark.parametrize(
    ("queries", "ranks", "said"),
    [
        (1, 4, "query_ranks=4: in this model there are 3 queries to share; raise method.num_quer"),
        (1, 3, ""),
        (2, 7, "there are 6 queries"),
        (2, 6, ""),
    ],
)
def test_more_ranks_than_the_model_has_blocks_are_refused(
    queries: int, ranks: int, said: str
) -> None:
    """Of method.num_blocks=null the layers say how many there are, before the first step."""
    words = [f"method.num_queries={queries}", f"query_ranks={ranks}", "method=zo_block"]
    method = ZOBlock(layers(3), lr=1e-2, eps=1e-3, num_queries=queries)
    if said:
        with pytest.raises(UserError, match=said):
            refuse_idle_ranks(settings_of(*words), method)
    else:
        refuse_idle_ranks(settings_of(*words), method)


def test_one_block_is_one_query() -> None:
    method = ZOBlock(layers(1), lr=1e-2, eps=1e-3)
    with pytest.raises(UserError, match="there is 1 query to share"):
        refuse_idle_ranks(settings_of("method=zo_block", "query_ranks=2"), method)


def test_what_settings_say_is_refused_before_the_model_is_loaded() -> None:
    """By run/ranks.py; so nothing is refused here."""
    settings = settings_of("method=mezo", "query_ranks=2")
    refuse_idle_ranks(settings, MeZO(layers(1), lr=1e-2, eps=1e-3))

"""Say what scores of an untouched model follow from, and where they are kept for other runs."""

from collections.abc import Callable
from typing import Any

from smezo_cli.files.fetch import cache_dir
from smezo_cli.run import mask
from smezo_cli.run.begin import Run
from smezo_cli.run.follows_from import machine_and_model
from smezo_cli.run.loaded import Loaded
from smezo_cli.store.score_cache import ScoreCache


def of(
    run: Run, loaded: Loaded, as_it_came: bool, base_digest: Callable[[], str]
) -> ScoreCache | None:
    """Return where scores are kept, if the run asks for it and the weights are those that came.

    With an adapter that is on or beside 4-bit weights, with weights that are codes, with a probe in
    place of the output layer, with Python files that the model brings and where the memory was too
    small for a batch nothing is kept: no other run would have it, or know it.

    Args:
        run: that asks.
        loaded: the model.
        as_it_came: it computes without its adapter, if it has one.
        base_digest: returns that of the weights that came.
    """
    if loaded.adapter is not None and run.settings.model["quantization"]:
        return None  # the scales beside its codes are no parameters
    if loaded.scorer.most_at_once:
        return None
    holds_codes = loaded.adapter is None and loaded.of_base is not None
    is_other = holds_codes or mask.holds_codes(loaded) or loaded.scorer.probe is not None
    is_other = is_other or (loaded.adapter is not None and not as_it_came)
    if not run.settings.cache_scores or is_other or run.settings.model["trust_remote_code"]:
        return None
    return ScoreCache(cache_dir() / "scores", _about(run, loaded, base_digest()))


def _about(run: Run, loaded: Loaded, base_digest: str) -> dict[str, Any]:
    scorer, batching = loaded.scorer, run.notes["batching"]
    return machine_and_model(loaded, run.versions) | {
        "weights": base_digest,
        # Layers that an adapter has wrapped may round otherwise, even with it off.
        "adapter": run.settings.method.get("adapter"),
        "batching": [batching["scores"], batching["answers"]],
        "forwards": [scorer.most_tokens, scorer.holds_common, scorer.always_caches],
    }

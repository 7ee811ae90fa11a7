"""Say what scores of an untouched model follow from, and where they are kept for other runs."""

from typing import Any

from smezo_cli.files.fetch import cache_dir
from smezo_cli.run import mask
from smezo_cli.run.begin import Run
from smezo_cli.run.follows_from import machine_and_model
from smezo_cli.run.loaded import Loaded
from smezo_cli.store.saved import tensors_digest
from smezo_cli.store.score_cache import ScoreCache


def of(run: Run, loaded: Loaded) -> ScoreCache | None:
    """Return where scores are kept, if the run asks for it and the weights are those that came.

    With an adapter, with weights that are codes, with a probe in place of the output layer and with
    Python files that the model brings nothing is kept: no other run would have it, or know it.
    """
    is_other = loaded.adapter is not None or loaded.of_base is not None or mask.holds_codes(loaded)
    is_other = is_other or loaded.scorer.probe is not None
    if not run.settings.cache_scores or is_other or run.settings.model["trust_remote_code"]:
        return None
    return ScoreCache(cache_dir() / "scores", _about(run, loaded))


def _about(run: Run, loaded: Loaded) -> dict[str, Any]:
    scorer, batching = loaded.scorer, run.notes["batching"]
    return machine_and_model(loaded, run.versions) | {
        "weights": tensors_digest(dict(loaded.model.state_dict())),
        "batching": [batching["scores"], batching["answers"]],
        "forwards": [scorer.most_tokens, scorer.holds_common, scorer.always_caches],
    }

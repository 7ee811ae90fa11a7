"""The parts of smezo that the fuzzer calls."""

from pathlib import Path
from typing import Any

_settings: dict[str, Any] = {}


def settings_of(*words: str) -> Any:
    """Checked settings, composed once a worker."""
    from smezo_cli.config import compose, settings

    key = repr(words)
    if key not in _settings:
        _settings[key] = settings.check(compose.compose(words))
    return _settings[key]


def tiny_model() -> tuple[Any, Any]:
    """tiny-llama and its tokenizer, loaded once a worker."""
    import torch

    from smezo_cli.models.load import load_model

    if "model" not in _settings:
        node = settings_of("task=toy", "model=tiny-llama").model
        _settings["model"] = load_model(
            node, dtype=torch.float32, device=torch.device("cpu"), cache=Path("cache")
        )
    return _settings["model"]

"""Seal a JSON object with a SHA-256 of itself, so that damage to the file is seen."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from smezo_cli.files import strict_json


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content with a SHA-256 of itself; numbers that are not finite become None."""
    plain: dict[str, Any] = strict_json.finite(_without_seal(content))
    return plain | {"sha256": _seal(plain)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return sealed content without its seal, or None if it is not what was sealed."""
    plain = _without_seal(content)
    return plain if _seal(plain) == content.get("sha256") else None


def _without_seal(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "sha256"}


def _seal(plain: Mapping[str, Any]) -> str:
    # Older files hold NaN, and are sealed with it.
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

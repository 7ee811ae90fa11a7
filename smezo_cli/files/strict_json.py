"""Write JSON as its standard has it: without NaN and Infinity, which other readers refuse."""

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(value: Any, **how: Any) -> str:
    """Return JSON text in which a number that is not finite is null.

    Args:
        value: plain values.
        how: arguments of :func:`json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False, **how)


def finite(value: Any) -> Any:
    """Return plain values with None in place of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value

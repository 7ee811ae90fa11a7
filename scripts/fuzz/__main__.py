"""Fuzz as the command line says."""

import argparse
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where the package `fuzz` lies

from fuzz.cases import KINDS  # noqa: E402
from fuzz.harness import fuzz  # noqa: E402


def summary(found: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Counts by kind."""
    kinds = {}
    for name in sorted({record["kind"] for record in found}):
        of = [record for record in found if record["kind"] == name]
        kinds[name] = {
            "cases": len(of),
            "refused": sum(record["refused"] for record in of),
            "findings": sum(record["finding"] is not None for record in of),
            "slowest_s": max(record["seconds"] for record in of),
        }
    total = {key: sum(of[key] for of in kinds.values()) for key in ("cases", "refused", "findings")}
    return {"kinds": kinds, "total": total, "seconds": round(seconds, 1)}


def main() -> int:
    """Fuzz as the command line says; 1 where there is a finding."""
    parser = argparse.ArgumentParser(description="hostile inputs through smezo's own entries")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), default=[])
    parser.add_argument("--case", type=int, help="this case of one --kind alone")
    parser.add_argument("--json", help="the counts and findings as a file")
    given = parser.parse_args()
    say = functools.partial(print, flush=True)
    start = time.monotonic()
    found = fuzz(given.cases, given.seed, given.kind, given.case, say)
    report = summary(found, time.monotonic() - start)
    for name, of in (*report["kinds"].items(), ("all", report["total"])):
        print(f"{name:14}", "  ".join(f"{key} {value}" for key, value in of.items()))
    print(f"{report['seconds']} s, seed {given.seed}")
    if given.json:
        report |= {"seed": given.seed, "found": [r for r in found if r["finding"] is not None]}
        Path(given.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if report["total"]["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())

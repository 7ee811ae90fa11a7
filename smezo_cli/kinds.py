"""Name the three kinds of tasks, and the metric that counts for each."""

METRICS = {"classification": "accuracy", "choice": "accuracy", "generation": "f1"}

KINDS = ("classification", "choice", "generation")

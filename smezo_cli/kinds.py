"""The three kinds of a task, and the metric that counts for each."""

# The figure that counts, by the kind of the task.
METRICS = {"classification": "accuracy", "choice": "accuracy", "generation": "f1"}


KINDS = ("classification", "choice", "generation")

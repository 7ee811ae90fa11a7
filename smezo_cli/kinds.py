"""Name the three kinds of tasks and the mixture of several, and the metric that counts for each."""

METRICS = {"classification": "accuracy", "choice": "accuracy", "generation": "f1"}

MIXTURE = "mixture"  # of several tasks, each of a kind of PART_KINDS

PART_KINDS = ("classification", "choice")

METRICS[MIXTURE] = METRICS[PART_KINDS[0]]  # of all its parts

KINDS = ("classification", "choice", "generation")

"""Score candidates and answers by a model, and turn scores into metrics."""

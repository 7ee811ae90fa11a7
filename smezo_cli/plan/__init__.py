"""Plan what a run will need, from its settings alone."""

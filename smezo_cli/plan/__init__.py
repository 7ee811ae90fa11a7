"""What a run will need, from its settings alone."""

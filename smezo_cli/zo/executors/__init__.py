"""How the losses of a step are measured: one after the other, in turns, or in place."""

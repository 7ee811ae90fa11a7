"""Move the weights by the coefficients of a gradient."""

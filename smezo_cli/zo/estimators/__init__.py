"""Turn the losses of a step into scalars, and scalars into the coefficients of a gradient."""

"""How the losses of a step become scalars, and scalars the coefficients of a gradient."""

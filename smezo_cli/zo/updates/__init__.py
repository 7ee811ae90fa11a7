"""How the coefficients of a gradient move the weights."""

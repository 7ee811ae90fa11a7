"""One pass over a tensor: draw, mask, move; eager, compiled by torch, or by Numba."""

"""Make one pass over a tensor: draw, mask, move; eager, compiled by torch, by Numba or Triton."""

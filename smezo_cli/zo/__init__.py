"""Take zeroth-order steps on any torch module: a library of torch (and Numba) alone."""

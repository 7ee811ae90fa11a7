"""The zeroth-order library: torch alone (Numba where it is there), nothing else of smezo."""

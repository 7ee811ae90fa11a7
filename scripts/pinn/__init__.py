"""Solve partial differential equations by tensor-train networks and zeroth-order steps."""

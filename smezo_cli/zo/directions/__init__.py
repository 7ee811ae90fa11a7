"""Define u(key), the direction along which a step probes and moves."""

"""What u(key) is: the direction along which a step probes and moves."""

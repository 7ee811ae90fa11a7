"""Use the machine: devices, memory, signals, standard streams, launchers."""

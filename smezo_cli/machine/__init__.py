"""Ask and tell the machine: devices, memory, threads, signals, streams, launchers."""

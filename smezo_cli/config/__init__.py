"""Turn a command line into checked settings, and into the runs that they name."""

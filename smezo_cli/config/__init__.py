"""From a command line to checked settings, and to the runs that they name."""

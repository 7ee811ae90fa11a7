"""Make one run, from loading to result.json."""

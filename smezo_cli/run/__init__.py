"""One run, from loading to result.json."""

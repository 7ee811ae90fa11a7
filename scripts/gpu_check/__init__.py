"""Check on a GPU, within minutes, what the tests cannot check on a CPU."""

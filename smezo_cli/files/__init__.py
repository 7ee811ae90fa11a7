"""Read and write files: within limits, whole or not at all, fetched by their SHA-256."""

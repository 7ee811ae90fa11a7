"""Use smezo with the libraries that people train and score with already."""

"""Use smezo's methods from the libraries that people train with already."""

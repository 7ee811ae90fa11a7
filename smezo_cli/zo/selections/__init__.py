"""Which coordinates of a tensor a step perturbs and updates."""

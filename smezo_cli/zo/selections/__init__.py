"""Select the coordinates of a tensor that a step perturbs and updates."""

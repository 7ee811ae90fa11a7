"""Race to a dev loss: what scripts/race.py is made of."""

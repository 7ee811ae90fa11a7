"""Measure the losses of a step: one after the other, in turns, in one batch, or in place."""

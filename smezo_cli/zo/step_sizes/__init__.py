"""Measure how far a step goes along its gradient."""

"""Measure what a step costs."""

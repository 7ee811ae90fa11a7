"""Implement the methods, a file each; the loop asks of each what ``methods.base.Method`` lists."""

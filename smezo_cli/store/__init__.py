"""The files of a run folder: what a run writes and reads back."""

"""Load language models and what is put beside their weights."""

"""Read finished runs and lay them out: lists, tables, figures."""

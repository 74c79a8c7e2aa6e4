"""Benchmarks: each a command, `python bench/NAME.py`, that prints a table and writes JSON. Kept results are in results/."""

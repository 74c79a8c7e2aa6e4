"""A study: a grid of trainings over seeds, run by one command, and its results as tables and a page.

config (the yaml file), cells (a training of one seed and its folder), lock (who works in a folder), jobs (running a cell),
executors (this machine, Slurm, Dask), run (what is missing, in order).
collect (of all cells, to results), from attempts (how often and how long) and outcomes (what was measured); statistics, published, findings.
tables, markdown, page (what is written).
"""

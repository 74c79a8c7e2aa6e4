"""What a training step costs, predicted before it is run (`python -m c4c.roofline`).

hardware    what the makers say about GPUs
counts      operations, bytes and memory of a step, counted on the real modules; work: what they are
assumptions what neither of them can know, by name
predict     seconds and memory of a step; loading: of the loader's stages
memory_table   what fits a card of 24 GB, for each way to train
report      predictions as text; advice: what limits a step, and what would help
"""

"""Features of a split, and what they find.

metrics     ranks and recall
evaluate    a checkpoint on a split
"""

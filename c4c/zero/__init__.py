"""All that touches DeepSpeed, and checkpoints.

engine      the model in an engine; config: its configuration; keys: what users may add to that; adam: whose AdamW
state       weights and moments, at any ZeRO stage; snapshot: to a checkpoint and back; checkpoint: the files of a run's checkpoints
ema         a moving average of the weights
distributed     ranks that find each other
patches     every workaround; skipping: those for steps that are not finite
"""

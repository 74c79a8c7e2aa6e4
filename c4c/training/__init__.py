"""A run from its configuration to its folder.

trainer     the loop
session     model, data and engine of one rank, which check and replay share; optim: schedule and groups of weights
run_folder  what a run leaves behind; metric_log: its curves; lock: one training at a time
screen      what a person sees meanwhile; terminal: Ctrl-C there
guard       signals, ranks that differ or fall silent, steps that are not finite; peers: which rank vanished
check, replay       `launch/train.py --check` and `--replay`
stages      several runs and evaluations one after another
"""

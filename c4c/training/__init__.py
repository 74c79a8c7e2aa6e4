"""A run from its configuration to its folder.

trainer     the loop
session     model, data and engine of one rank, which check and replay share
step        one update, with accumulation or gradient caching; outcome: what it came to
lr_schedule, param_groups   learning rates, and which weights take which
run_folder  what a run leaves behind; metric_log: its curves; lock: one training at a time
screen      what a person sees meanwhile
signals     SIGTERM and Ctrl-C; terminal: Ctrl-C at a terminal
watchdog    ranks that do not respond; peers: ranks that vanished; agreement: what ranks decide alike
early_stopping, bad_steps, memory   what else ends a run
check, replay       `launch/train.py --check` and `--replay`
stages      several runs and evaluations one after another
"""

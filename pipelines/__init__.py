"""From shards to batches on a device. This room knows DALI; it does not know the model or DeepSpeed.

order      which (video, caption) pairs a step sees: a pure function of (seed, epoch, step)
sampling   which frames of a video: a pure function of its frame table and the rule
lane       bytes to normalised frames, by one DALI graph a lane
tokens     captions to token ids
loader     the next batches, ahead of the step, with the time a step waits measured
"""

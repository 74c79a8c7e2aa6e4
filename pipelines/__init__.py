"""From shards to batches on a device. This room knows DALI; it does not know the model or DeepSpeed.

order      which (video, caption) pairs a step sees: a pure function of (seed, epoch, step)
sampling   which frames of a video: a pure function of its frame table and the rule
read       the bytes of those frames out of the shards, checked
graph      DALI: bytes to uint8 frames of the recipe's size; augment: which part of a picture, and its look
cache      uint8 frames kept between epochs
normalise  uint8 to the numbers a model takes
lane       all of that for the clips of a batch
tokens     captions to token ids; lengths: how many, where torch is not wanted
survey     what a run would do to its splits without a word
loader     the next batches, ahead of the step, with the time a step waits measured; quarantine, stats, workers are its parts
bench      the loader alone, from the command line
"""

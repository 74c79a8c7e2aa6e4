"""From shards to batches on a device. This room knows DALI; it does not know the model or DeepSpeed.

    pairs -> requests | fetch | decode | augment | normalise, collate | replace | batch | prefetch -> the step

pair_order      which (video, caption) pairs a step sees: a pure function of (seed, epoch, step); shuffle, mixture: its parts
frame_sampling  which frames of a video: a pure function of its frame table and the rule; narration: which part of a long one
requests        the source of the chain, and the sample that passes along it
chain           its skeleton: stages that pull, each with its time counted, and the thread that works ahead of the step
lanes           which stages a split takes on a device; stages/: a file each
loader          batches for training; eval_loader: every video once; running: what both are
remote_prefetch bytes of remote shards, before they are wanted
tokens          captions to token ids; lengths: how many, where torch is not wanted
survey          what a run would do to its splits without a word
quarantine, stats, workers, frames (pictures for people to look at), bench (the loader alone)
"""

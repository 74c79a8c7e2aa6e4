"""From videos and captions to the shards of a split.

pack         the packing: what is to be done, by whom, and what of it is done
plan         which videos go into which shard, as packing.json records it; differences: how two packings differ, in words
scheduler    shards to processes, here or on a Dask cluster; worker: one shard in one process
sources      the source videos on disk; rows: what is recorded of a packed video
finish       dataset.json, captions.npy and rejects.jsonl
update       a split brought up to date without transcoding what is packed; committed: what its shards hold
"""

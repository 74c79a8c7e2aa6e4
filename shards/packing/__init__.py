"""From videos and captions to the shards of a split.

pack        the plan, what of it is done, and the split's own files
scheduler   shards to processes, here or on a Dask cluster; worker: one shard in one process
update      a split brought up to date without transcoding what is there
"""

"""What looks after a packed split.

verify, info, preview, dedup, repair    each a command of that name
rebuild     one shard of `repair`: index and table from the tar; tar_samples: what the tar itself tells
reshard     several splits into one, one into several; regroup: whole shards as they are, single samples copied
hashes      columns of whole splits as 64-bit numbers
"""

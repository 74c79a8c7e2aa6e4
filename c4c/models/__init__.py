"""The model and its weights.

clip4clip   CLIP's towers and a similarity head
towers      the towers, as open_clip builds them; heads: a file a kind of head
weights     checkpoints of every project known, recognised by their names; archives: torch's files, read without running them
pretrained  any checkpoint with the data settings that go with it
flops       operations of a step; compiled: towers under torch.compile
"""

"""The model and its weights.

clip4clip   CLIP's towers and a similarity head
towers      the towers, as open_clip builds them; heads: a file a kind of head
weights     checkpoints of every project known, a file a family; export: models in other layouts, a file a layout
pretrained  any checkpoint with the data settings that go with it
depth       where in a tower a weight is; lora: small matrices that learn in place of large ones
prompts     vectors that learn in the blocks of towers that are frozen
token_merging  fewer tokens from block to block of the image tower
origin      frozen weights that checkpoints leave out, and where they come from again
flops       operations of a step; compiled: towers under torch.compile
"""

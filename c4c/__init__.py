"""c4c: train and evaluate text-to-video retrieval models of the CLIP4Clip family."""

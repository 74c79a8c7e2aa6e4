"""One video file: its packets and times, its frames as a player shows them, and the bytes of each.

probe           packets to times, rate and duration; whether the file ends early
source          the file as packing sees it: codec, size, and where the bytes of each frame are
decode          frames in the order of presentation
random_access   a few frames of a stored video, by its frame table
geometry        the size that pictures are scaled to
picture         turned, mirrored, in square pixels and the right colours
profiles        what is stored of a video; encode, writer: how
"""

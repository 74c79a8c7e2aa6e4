"""Features of videos and captions, and what they find: on a packed split, and in an index of one's own videos.

request     what launch/eval.py is asked for
evaluate    a checkpoint on splits
work        how ranks and threads share, so that no number depends on it
features    of all videos and captions; views: several clips and crops of a video
metrics     tiles of scores, ranks and recall; rerank: corrected scores
evaluation  what was found; output: its files; report/: its page
encoder     vectors of single texts and clips; runtimes: what computes them
index/      videos to segments, in a store
search/     what an index holds for a sentence or an example
serve/      the search page
"""

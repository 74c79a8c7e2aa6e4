"""The index of a search: videos in segments, as rows of a LanceDB database.

command   what `python -m c4c.index` does; plan: which videos are new; screen: what a person sees
build     videos to rows: frames by threads, features by the towers; rows: what a video becomes
store     the index, opened; database: tables, processes that write at once, the folder `text`
scan      exact search; ann: approximate search; filters: which segments are looked at
"""

"""Searching an index.

query     what people ask: sentences, clips, pictures
searcher  what is found
show      results on a terminal, as JSON lines, as a page
"""

"""Shards: the training set on disk, one row per frame, one row group per clip, in Parquet that any tool opens.

schema names the columns, codec packs pixels, index knows which clip lies where, writer and reader do what they say.
Nothing in here knows how a clip was fetched, judged or labelled.
"""

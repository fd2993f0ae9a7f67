"""Shards: the training set on disk, one row per frame, one row group per clip, in Parquet that any tool opens.

schema names the columns, codec packs pixels, index knows where each clip is, writer and reader write and read shards.
Nothing here knows how a clip was fetched, judged or labelled.
"""

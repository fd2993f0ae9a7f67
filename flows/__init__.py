"""Thin Prefect flows over `curation`. Nothing is decided here; the same jobs run without Prefect from Python."""

DOWNLOAD_TAG = "download"  # the tag whose concurrency limit bounds parallel downloads over all runs and machines

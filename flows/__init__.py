"""Thin Prefect flows over `curation`. Nothing is decided here; `curation.pipeline` does the same without Prefect."""

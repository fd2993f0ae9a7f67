"""Thin Prefect flows over `curation`. Nothing is decided here; the same jobs run without Prefect from Python."""

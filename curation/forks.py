"""Imported once, by the process that the pool is forked from: the slowest import, without starting threads."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when torch is imported; each process has one core

import torch  # noqa: F401

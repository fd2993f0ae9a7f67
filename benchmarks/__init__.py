"""Speed as ratios: ours, the naive way and the floor in one run. Each module is run as `python -m benchmarks.NAME`."""

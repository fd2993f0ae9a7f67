"""Proves that this network equals the released one, with golden files whose weights need no checkpoint.

`run` checks a folder, `network` computes each output, `compare` measures the difference of two values, `weights` makes
the weights of a network. All of it uses `unish_model.network`, which does not depend on it.
"""

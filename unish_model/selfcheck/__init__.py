"""The proof that this network is the released one: golden numbers of theirs, made with weights that need no checkpoint.

`run` checks a folder, `network` computes each output, `compare` says how far two values are apart, `weights` makes the
numbers to fill a network with. All of it stands above `unish_model.network`, which knows nothing of it.
"""

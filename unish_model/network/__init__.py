"""The UniSH network: one module for each branch, their parts, and their inputs and outputs.

Every tensor's type states its shape, which the tests check at run time. Each dimension has one name in all modules:

- `B` clips, `S` frames of each, `frames` all frames of all clips where each is processed independently.
- `H`, `W` rows and columns of pixels; `h`, `w` of the resized image.
- `patches`, `queries`, `tokens` (special tokens, then patches), `width` and other words for features.
- `J` joints, `betas` numbers of the body shape, `N` points or problems, `M` residuals of one problem.
- `*batch` any leading dimensions; `#` where they broadcast.
"""

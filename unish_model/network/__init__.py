"""The UniSH network: one module for each branch, their parts, and what goes in and out.

Every tensor's type states its shape, checked while the tests run. One dimension has one name in all modules:

- `B` clips, `S` frames of each, `frames` all frames of all clips where each is seen by itself.
- `H`, `W` rows and columns of pixels; `h`, `w` of the resized image.
- `patches`, `queries`, `tokens` (patches and what stands before them), `width` and other words for features.
- `J` joints, `betas` numbers of the body shape, `N` points or problems, `M` residuals of one problem.
- `*batch` any leading dimensions; `#` where they broadcast.
"""

"""Published numbers of real checkpoints, computed again: `open-gem verify`.

values    the numbers, each with its source, conditions and tolerance
checkers  how each kind is computed here: scores, dense tokens, masks
images    the images that they were published for
run       one result for each number
"""

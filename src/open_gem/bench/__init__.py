"""What dense features cost, beside the plain forward pass of the same model in the same run.

Compute does not depend on the values of weights, so random ones do. Times are of one machine at one moment: cases take
turns, so that what else the machine does falls on all of them alike, and ratios of medians are what to read.
"""

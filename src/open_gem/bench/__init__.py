"""Measures what dense features cost, relative to the plain forward pass of the same model in the same run.

Compute does not depend on the values of weights, so random weights are used. Times depend on the machine and its load:
cases take turns, so that the load affects all of them alike. Compare ratios of medians.
"""

"""Scores as counts that add: the counts of two parts of a data set add up to exactly those of the whole.

counts        `Records`: what each image adds
scores        functions of summed counts: mIoU, accuracies, ratios
segmentation  label maps: regions and their boundaries
points        labelled points (OpenImages V7)
objects       one object for each label: pointing game, IoU of masks and of boxes
contrast      the paper's analysis of patch features (section 5)
intervals     bootstrap intervals over images

A score does not depend on shards or on the order of counting: sums are rounded once, and `Records` are sorted by image
before they are used.
"""

"""Scores as counts that add: the counts of two parts of a data set add up to exactly those of the whole.

counts        what adds: `Mean`, a mean with an exact sum, and `Records`, small counts image by image
scores        what is made of summed counts: mIoU, accuracies, ratios
segmentation  label maps: `Confusion`, boundary IoU
points        labelled points (OpenImages V7)
objects       one phrase, one object: pointing game, IoU of masks and of boxes
contrast      the paper's analysis of patch features (section 5)
intervals     how sure a score is: over data sets of other images

Of every score there is one value, by whatever shards and in whatever order it was counted: integers add exactly, means
keep their sums as fractions, and `Records` are sorted by image before anything is made of them.
"""

from open_gem.evaluation.metrics.contrast import Sides, object_contrast, patch_similarity, text_contrast, to_grid
from open_gem.evaluation.metrics.counts import ImageCounts, Mean, Records
from open_gem.evaluation.metrics.intervals import Interval, bootstrap, bootstrap_difference, interval, resample
from open_gem.evaluation.metrics.objects import box_overlap, mask_overlap, pointing_game
from open_gem.evaluation.metrics.points import image_means, pair_means, point_counts
from open_gem.evaluation.metrics.scores import (
    Score,
    class_iou,
    frequency_weighted_iou,
    mean_accuracy,
    mean_iou,
    micro_iou,
    pixel_accuracy,
    point_accuracy,
    ratio,
)
from open_gem.evaluation.metrics.segmentation import Confusion, boundary, confusion

__all__ = [
    "Confusion",
    "ImageCounts",
    "Interval",
    "Mean",
    "Records",
    "Score",
    "Sides",
    "bootstrap",
    "bootstrap_difference",
    "boundary",
    "box_overlap",
    "class_iou",
    "confusion",
    "frequency_weighted_iou",
    "image_means",
    "interval",
    "mask_overlap",
    "mean_accuracy",
    "mean_iou",
    "micro_iou",
    "object_contrast",
    "pair_means",
    "patch_similarity",
    "pixel_accuracy",
    "point_accuracy",
    "point_counts",
    "pointing_game",
    "ratio",
    "resample",
    "text_contrast",
    "to_grid",
]

"""Labelling many images: classes, sources of images, rows, and the engines that write parts of them.

ontology   labels, their prompts and thresholds
reading    an item, which is an id and where the image's bytes are; and those bytes
remote     the same of files elsewhere
paths      files in folders and of patterns, as items
sources    folders, lists, tars, Parquet and data sets as items
rules      a localization -> objects and what is stored of them, without the model
kept       what the model saw, beside the parts
relabel    new parts from that, by other rules
sampling   a part of a source, chosen at random
labeling   an image -> a row, for every engine
done       which images are in some part, in little memory; the lock of a folder that is written to
local      decoding threads -> the model -> a writer of parts, on this machine
on_ray     the same parts by Ray, on as many machines as there are
control    estimates before a run, and clean shutdown by signals
watching   sources that grow: what has settled, and errors whose files have changed
summary    counts of objects, labels and errors
sheet      a page of samples
marks      detections that a person found right or wrong, and the page to mark them on
tuning     precision and recall against marks or true objects, and thresholds that follow
"""

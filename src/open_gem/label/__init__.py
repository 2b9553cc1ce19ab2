"""Labelling many images: what is looked for, where images come from, rows, and the engines that make parts of them.

ontology   labels, the phrases that mean them, and the thresholds of each
reading    an item, which is an id and where the image's bytes are; and those bytes
remote     the same of files elsewhere
paths      the files that folders and patterns mean, as items
sources    folders, lists, tars, Parquet and data sets as items
labeling   an image -> a row; pure, whichever engine asks
done       which images are in some part, in little memory; the lock of a folder that is written to
local      decoding threads -> the model -> a writer of parts, on this machine
on_ray     the same parts by Ray, on as many machines as there are
control    estimates before a run, and signals that end it in order
watching   sources that grow: what has settled, and errors whose files have changed
summary    what was found, in numbers and as pictures
"""

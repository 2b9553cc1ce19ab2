"""Class names of the data sets by who used them: files of `classes/`, one class a line.

official  the data set's own, in mmsegmentation's spelling
groupvit  GroupViT's evaluation, which the published GEM uses
maskclip  MaskCLIP's
sclip     SCLIP's: synonyms after commas, and words for the background, if there is one, in the first line
"""

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from open_gem.text import Vocabulary  # imports torch, which listing data sets can do without

NAMES: dict[str, tuple[str, ...]] = {  # the default first
    "voc": ("groupvit", "maskclip", "sclip", "official"),
    "context": ("groupvit", "maskclip", "sclip", "official"),
    "coco_object": ("official", "sclip"),
    "coco_stuff": ("official", "sclip"),
    "ade20k": ("official", "sclip"),
    "cityscapes": ("official", "sclip"),
}
WITH_BACKGROUND = {("voc", "sclip"), ("context", "sclip"), ("coco_object", "sclip")}  # in the first line


def read_names(family: str, variant: str, background: bool) -> "Vocabulary":
    """Return the names of a row of `NAMES`, with words for the background only if `background`."""
    from open_gem.text import Vocabulary  # imports torch, which listing data sets can do without

    with resources.as_file(resources.files("open_gem.data") / "classes" / f"{family}.{variant}.txt") as path:
        vocabulary = Vocabulary.read(Path(path), background=(family, variant) in WITH_BACKGROUND)
    return vocabulary if background else Vocabulary(vocabulary.labels, vocabulary.prompts)

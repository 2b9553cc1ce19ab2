"""Models that cover most needs: the table of `open-gem models --recommend`."""

from typing import NamedTuple


class Choice(NamedTuple):
    """A model to try first.

    name, tag      for `load`
    parameters     of both towers, in millions
    patch          side of a patch in pixels
    relative_time  of GEM on an image of 448×448 pixels, as a share of ViT-B/16's, by `benchmarks/models.py` with random
                   weights on two CPU cores
    licence        of the weights
    about          what speaks for it
    published      mIoU of GEM in percent on VOC and Context (table 4 of the paper) and ADE20K (as ClearCLIP's authors
                   measured it), None for unknown
    """

    name: str
    tag: str
    parameters: float
    patch: int
    relative_time: float
    licence: str
    about: str
    published: tuple[float | None, float | None, float | None] = (None, None, None)

    @property
    def download(self) -> int:
        """Size of its weights in MB: four bytes a parameter, since most are published in float32."""
        return round(4 * self.parameters)


CHOICES = (
    Choice("ViT-B-16", "openai", 149.6, 16, 1.0, "MIT", "the default, and the model of the paper", (46.2, 32.6, 15.7)),
    Choice("ViT-B-32", "openai", 151.3, 32, 0.24, "MIT", "fastest; coarse maps", (40.5, 27.0, None)),
    Choice("ViT-L-14", "openai", 427.6, 14, 3.9, "MIT", "knows more, localizes no better", (44.6, 28.6, 11.6)),
    Choice("ViT-B-16", "laion2b_s34b_b88k", 149.6, 16, 1.0, "MIT", "OpenCLIP: trained on open data"),
    Choice("ViT-B-16", "metaclip_400m", 149.6, 16, 1.0, "CC-BY-NC-4.0", "MetaCLIP: the model of gem_torch's demo"),
    Choice("ViT-B-16-SigLIP2", "webli", 375.2, 16, 1.0, "Apache-2.0", "many languages; needs the extra transformers"),
    Choice("PE-Core-B-16", "meta", 447.7, 16, 1.1, "Apache-2.0", "strong at what is in an image"),
)

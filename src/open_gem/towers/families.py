"""The families of models that can be read: one row each. A new kind of vision tower is one file in `towers/` and a row.

The first row whose pattern fits a model's name is its family.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from open_gem.errors import UnsupportedModelError

if TYPE_CHECKING:
    from open_gem.towers.base import ModuleTower


@dataclass(frozen=True)
class ModelFamily:
    """One row.

    name      as people call it
    library   whose models: "open_clip" or "transformers"
    pattern   a regular expression that occurs in the names that belong to it
    tower     "file:class" in `towers/` of what reads its vision transformer
    examples  (name, tag or None) for `load`; the first is checked at full size
    about     what is particular about reading it
    tested    what it was compared with
    """

    name: str
    library: str
    pattern: str
    tower: str
    examples: tuple[tuple[str, str | None], ...]
    about: str
    tested: str = "the library's forward"


FAMILIES = (
    ModelFamily(
        "CLIPA",
        "open_clip",
        "CLIPA",
        "native:NativeTower",
        (("ViT-L-14-CLIPA", "datacomp1b"), ("ViT-H-14-CLIPA-336", "laion2b"), ("ViT-bigG-14-CLIPA", "datacomp1b")),
        "mean of patches; final norm on each token; ImageNet statistics",
    ),
    ModelFamily(
        "CoCa",
        "open_clip",
        "^coca",
        "native:NativeTower",
        (("coca_ViT-B-32", "laion2b_s13b_b90k"), ("coca_ViT-L-14", "laion2b_s13b_b90k")),
        "attention pool: each patch through it alone",
    ),
    ModelFamily(
        "NLLB-CLIP",
        "open_clip",
        "^nllb-clip-(base|large)$",
        "native:NativeTower",
        (("nllb-clip-base", "v1"), ("nllb-clip-large", "v1")),
        "201 languages; text tower from transformers",
    ),
    ModelFamily(
        "SigLIP",
        "open_clip",
        "SigLIP|siglip",
        "vit:VitTower",
        (
            ("ViT-B-16-SigLIP", "webli"),
            ("ViT-SO400M-14-SigLIP-384", "webli"),
            ("ViT-B-16-SigLIP2-256", "webli"),
            ("ViT-SO400M-16-SigLIP2-384", "webli"),
            ("ViT-B-16-SigLIP-i18n-256", "webli"),
            ("nllb-clip-base-siglip", "v1"),
        ),
        "SigLIP 1 and 2, NLLB-SigLIP; no class token; attention pool: each patch through it alone",
    ),
    ModelFamily(
        "MobileCLIP",
        "open_clip",
        "^MobileCLIP2?-(B|L-14)$",
        "vit:VitTower",
        (("MobileCLIP-B", "datacompdr"), ("MobileCLIP2-B", "dfndr2b"), ("MobileCLIP2-L-14", "dfndr2b")),
        "MobileCLIP 1 and 2, the transformers only: S0 to S4 are FastViT; convolutions make the patches of B",
    ),
    ModelFamily(
        "ViTamin",
        "open_clip",
        "^ViTamin-|^vit_medium_patch16_gap_256$",  # the latter has no published weights, so no row
        "vit:VitTower",
        (("ViTamin-S", "datacomp1b"), ("ViTamin-L-336", "datacomp1b"), ("ViTamin-XL-256", "datacomp1b")),
        "two stages of convolutions make the patches; mean of patches; no class token",
    ),
    ModelFamily(
        "EVA-CLIP",
        "open_clip",
        "^EVA0[12]-",
        "eva:EvaTower",
        (
            ("EVA02-B-16", "merged2b_s8b_b131k"),
            ("EVA02-L-14-336", "merged2b_s6b_b61k"),
            ("EVA01-g-14", "laion400m_s11b_b41k"),
            ("EVA02-E-14-plus", "laion2b_s9b_b144k"),
        ),
        "EVA01 and EVA02; rotary positions in B and L; norms after the branches in E",
    ),
    ModelFamily(
        "PE-Core",
        "open_clip",
        "^PE-Core-",
        "eva:EvaTower",
        (("PE-Core-B-16", "meta"), ("PE-Core-L-14-336", "meta"), ("PE-Core-bigG-14-448", "meta")),
        "Perception Encoder; rotary and learned positions; attention pool: each patch through it alone",
    ),
    ModelFamily(
        "CLIP",
        "open_clip",
        "ViT-[a-zA-Z]+-[0-9]+",
        "native:NativeTower",
        (
            ("ViT-B-16", "openai"),
            ("ViT-L-14-336", "openai"),
            ("ViT-B-16", "laion2b_s34b_b88k"),
            ("ViT-H-14", "laion2b_s32b_b79k"),
            ("ViT-B-16", "datacomp_xl_s13b_b90k"),
            ("ViT-B-16", "metaclip_400m"),
            ("ViT-H-14-worldwide", "metaclip2_worldwide"),
            ("ViT-B-16", "dfn2b"),
        ),
        "OpenAI, OpenCLIP (LAION), DataComp, MetaCLIP 1 and 2, DFN; B/32 to bigG/14",
        tested="the library's forward; the published GEM, CLIP Surgery, MaskCLIP, ClearCLIP",
    ),
    ModelFamily(
        "MetaCLIP 2",
        "transformers",
        "metaclip-2-",
        "hf_clip:HfClipTower",
        (("facebook/metaclip-2-worldwide-huge-quickgelu", None),),
        "300 languages; as CLIP",
    ),
    ModelFamily(
        "CLIP",
        "transformers",
        "clip-vit-|CLIP-ViT-|metaclip-[a-z][0-9]+-",
        "hf_clip:HfClipTower",
        (
            ("openai/clip-vit-base-patch16", None),
            ("openai/clip-vit-large-patch14-336", None),
            ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", None),
            ("facebook/metaclip-b16-400m", None),
            ("wkcn/TinyCLIP-ViT-40M-32-Text-19M-LAION400M", None),
        ),
        "OpenAI, OpenCLIP (LAION), MetaCLIP 1, TinyCLIP, and your own in this format",
        tested="the library's forward; open_clip's tower with the same weights",
    ),
    ModelFamily(
        "SigLIP 2 NaFlex",
        "transformers",
        "siglip2-.*-naflex",
        "hf_naflex:NaflexTower",
        (("google/siglip2-base-patch16-naflex", None), ("google/siglip2-so400m-patch16-naflex", None)),
        "any shape of grid; no class token; attention pool: each patch through it alone",
    ),
    ModelFamily(
        "TIPSv2",
        "transformers",
        "tipsv2-",
        "hf_tipsv2:Tipsv2Tower",
        (("google/tipsv2-b14", None), ("google/tipsv2-l14", None)),
        "trained for dense features, as published with `--method maskclip`; pixels are not normalised",
    ),
    ModelFamily(
        "SigLIP",
        "transformers",
        "siglip",
        "hf_siglip:HfSiglipTower",
        (
            ("google/siglip-base-patch16-224", None),
            ("google/siglip-so400m-patch14-384", None),
            ("google/siglip2-base-patch16-224", None),
        ),
        "SigLIP 1 and 2 of fixed resolution; no class token; attention pool: each patch through it alone",
    ),
    ModelFamily(
        "BLIP",
        "transformers",
        "blip-itm-|^blip-(base|large)$",
        "blip:BlipTower",
        (("Salesforce/blip-itm-base-coco", None), ("Salesforce/blip-itm-large-coco", None)),
        "the contrastive half; Salesforce's own files as well: blip-base or blip-large with a .pth",
    ),
)


class TrainedFamily(NamedTuple):
    """A kind of model of transformers that was trained to localize.

    reader     what reads it here: a file of `trained`, and a class in it
    model      name of its class in transformers
    processor  name of its image processor there: one that resizes with PIL, as the models' own code did, if there is
               one
    part       attribute of the model that encodes texts; None for the model itself
    """

    reader: str
    model: str
    processor: str
    part: str | None = None


LOCALIZING: Mapping[str, TrainedFamily] = {
    "groupvit": TrainedFamily("groupvit:GroupViT", "GroupViTModel", "CLIPImageProcessorPil"),
    "clipseg": TrainedFamily("clipseg:CLIPSeg", "CLIPSegForImageSegmentation", "ViTImageProcessorPil", "clip"),
    "owlv2": TrainedFamily("owl:OWL", "Owlv2ForObjectDetection", "Owlv2ImageProcessorPil", "owlv2"),
    "owlvit": TrainedFamily("owl:OWL", "OwlViTForObjectDetection", "OwlViTImageProcessorPil", "owlvit"),
    "grounding-dino": TrainedFamily(
        "grounding_dino:GroundingDINO", "GroundingDinoForObjectDetection", "GroundingDinoImageProcessorPil"
    ),
    "sam3": TrainedFamily("sam3:SAM3", "Sam3Model", "Sam3ImageProcessor"),
    "sam3_video": TrainedFamily("sam3:SAM3", "Sam3Model", "Sam3ImageProcessor"),
}
"""`model_type` of transformers' models that were trained to localize → how they are read: for `load_trained`, not
backbones."""

ORIGINAL = ("blip-base", "blip-large")  # names for files of Salesforce's own, without a repository


def find_family(library: str, name: str) -> ModelFamily | None:
    """Return the family of a model of `library`, by its name."""
    return next((row for row in FAMILIES if row.library == library and re.search(row.pattern, name)), None)


def towers(library: str) -> list[type["ModuleTower"]]:
    """Return the classes that read vision towers of `library`; imports them, and so the library."""
    names = dict.fromkeys(row.tower for row in FAMILIES if row.library == library)
    return [_import(name) for name in names]


def _import(name: str) -> Any:
    file, _, tower = name.partition(":")
    return getattr(import_module(f"open_gem.towers.{file}"), tower)


def find_tower(library: str, module: Any) -> type["ModuleTower"] | None:
    """Return the tower that reads `module`, by its class; None if none does. A subclass does not count: it may
    differ."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return next((tower for tower in towers(library) if kind in tower.reads), None)


def check_not_trained(name: str, model_type: str) -> None:
    """Raise UnsupportedModelError for a model type that is for `load_trained`, not a backbone."""
    if model_type in LOCALIZING:
        raise UnsupportedModelError(
            f"{name} ({model_type}) was trained to localize and has no training-free readouts: use "
            f"open_gem.load_trained({name!r})"
        )

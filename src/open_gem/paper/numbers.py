"""The paper's own numbers (Grounding Everything, arXiv 2312.00878), by model, row and data set.

All values are in per cent: mIoU on PascalVOC and Pascal Context, IoU over points on OpenImages V7. Rows are named as in
`paper.rows`, methods as in `METHODS`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class PaperModel(NamedTuple):
    """A model that the paper evaluates: what to load, and other names of the same weights in runs."""

    name: str
    pretrained: str | None = None
    also: tuple[str, ...] = ()

    @property
    def known(self) -> tuple[str, ...]:
        """Every name of it in runs."""
        own = self.name if self.pretrained is None else f"{self.name}, {self.pretrained}"
        return own, *self.also


def _openai(name: str, transformers: str) -> PaperModel:
    return PaperModel(name, "openai", (f"{name}-quickgelu, openai", transformers))


B16, B32, GROUPVIT = "CLIP ViT-B/16", "CLIP ViT-B/32", "GroupViT"
MODELS: Mapping[str, PaperModel] = {
    B16: _openai("ViT-B-16", "openai/clip-vit-base-patch16"),
    "OpenCLIP ViT-B/16": PaperModel("ViT-B-16", "laion400m_e32"),  # as the authors' demo; the paper names no tag
    "BLIP ViT-B/16": PaperModel("Salesforce/blip-itm-base-coco"),  # the paper does not say which BLIP
    B32: _openai("ViT-B-32", "openai/clip-vit-base-patch32"),
    "OpenCLIP ViT-B/32": PaperModel("ViT-B-32", "laion400m_e32", ("ViT-B-32-quickgelu, laion400m_e32",)),
    "CLIP ViT-L/14": _openai("ViT-L-14", "openai/clip-vit-large-patch14"),
    "OpenCLIP ViT-L/14": PaperModel("ViT-L-14", "laion400m_e32"),
    "BLIP ViT-L/16": PaperModel("Salesforce/blip-itm-large-coco"),  # the paper has it under ViT-L/14
    GROUPVIT: PaperModel("nvidia/groupvit-gcc-yfcc"),
}
"""By name: those of Table 4, and GroupViT, which the authors measured too (Table 3)."""

TABLE_4 = tuple(label for label in MODELS if label != GROUPVIT)

DATASETS: Mapping[str, str] = {"voc2012": "mean_iou", "context59": "mean_iou", "openimages": "class_pooled"}
"""The paper's data sets, all on their split "val" → the score that its values are."""

Values = Mapping[str, Mapping[str, Mapping[str, float]]]
"""By model, row and data set, in per cent."""


def _by_data(*values: float | None) -> dict[str, float]:
    return {data: value for data, value in zip(DATASETS, values, strict=False) if value is not None}


_PROJECTIONS = ("value", "key", "query", "qkv")
_DEPTHS = [f"{depth} block{'s' if depth > 1 else ''}" for depth in range(1, 12)]


def _table_1(raw: Sequence[tuple[float, float]], normed: Sequence[tuple[float, float]]) -> dict[str, dict[str, float]]:
    """Return the values of Table 1, with which K = 0 agrees."""
    without = {f"{name}, raw": _by_data(*row) for name, row in zip(_PROJECTIONS, raw, strict=True)}
    return without | {f"{name}, norm, K = 0": _by_data(*row) for name, row in zip(_PROJECTIONS, normed, strict=True)}


def _table_5(plain: Sequence[float], mlp: Sequence[float]) -> dict[str, dict[str, float]]:
    without = {depth: _by_data(value) for depth, value in zip(_DEPTHS, plain, strict=True)}
    return without | {f"{depth}, MLP": _by_data(value) for depth, value in zip(_DEPTHS, mlp, strict=True)}


def _table_4(clip: Sequence[float | None], gem: Sequence[float | None]) -> dict[str, dict[str, float]]:
    return {"CLIP": _by_data(*clip), "GEM": _by_data(*gem)}


TABLES: Mapping[str, Values] = {
    "table1": {
        B16: {"CLIP": _by_data(10.4, 7.7)}
        | _table_1(
            ((41.9, 30.5), (43.9, 31.0), (43.8, 30.8), (43.1, 30.7)),
            ((44.4, 31.9), (44.8, 32.0), (44.7, 31.5), (45.1, 32.3)),
        )
    },
    "table3": {
        B16: {
            "CLIP": _by_data(10.4, 7.7, 27.6),
            "MaskCLIP": _by_data(28.6, 23.8, 42.0),
            "CLIPSurgery": _by_data(41.2, 30.5, 47.8),
            "GEM": _by_data(46.2, 32.6, 50.9),
        },
        GROUPVIT: {"as trained": _by_data(42.8, 15.1)},
    },
    "table4": {
        B16: _table_4((10.4, 7.7, 27.6), (46.2, 32.6, 50.9)),
        "OpenCLIP ViT-B/16": _table_4((13.6, 7.5, 26.3), (43.1, 31.7, 49.9)),
        "BLIP ViT-B/16": _table_4((4.4, 3.1, 29.4), (42.8, 23.5, 45.2)),
        B32: _table_4((4.8, 3.3, 28.1), (40.5, 27.0, 46.6)),
        "OpenCLIP ViT-B/32": _table_4((9.5, 5.4, 27.3), (39.3, 23.9, 45.5)),
        "CLIP ViT-L/14": _table_4((4.1, 3.8, 29.1), (44.6, 28.6, 46.3)),
        "OpenCLIP ViT-L/14": _table_4((6.6, 2.9, 27.0), (40.0, 27.5, 42.4)),
        "BLIP ViT-L/16": _table_4((7.2, 3.6, 29.7), (32.1, 21.4, 44.9)),
    },
    "table5": {
        B16: _table_5(
            (4.8, 43.8, 45.2, 45.5, 45.6, 45.3, 45.5, 45.5, 45.4, 45.4, 45.1),
            (26.2, 38.8, 42.4, 42.1, 42.2, 42.3, 41.9, 41.6, 41.7, 42.0, 41.6),
        ),
        B32: _table_5(
            (5.1, 26.1, 40.3, 41.5, 41.4, 41.3, 41.2, 41.2, 41.1, 41.0, 41.0),
            (4.3, 21.6, 38.4, 40.3, 40.2, 40.1, 40.1, 40.0, 39.7, 39.6, 39.7),
        ),
    },
}

QUOTED: Mapping[str, Mapping[str, float]] = {
    "SPNet †": _by_data(15.6, 4.0),
    "ZS3Net †": _by_data(17.7, 7.7),
    "OpenSeg": _by_data(72.2, 48.2),
    "MaskCLIP (Ding et al.)": _by_data(None, 45.9),
    "OVSeg": _by_data(94.5, 55.7),
    "CLIP-ES": _by_data(75.0),
    "ViL-Seg †": _by_data(34.4, 16.3),
    "GroupViT, as its authors have it": _by_data(52.3, 22.4),
    "OVSegmentor": _by_data(53.8, 20.4),
    "SegCLIP": _by_data(52.6, 24.7),
    "PACL": _by_data(72.3, 50.1),
    "MaskCLIP (Dong et al.)": _by_data(None, 17.2),
}
"""Rows of Table 3 that the paper quotes from others; †: evaluated on classes unseen in training only."""


def label_of(model: str) -> str | None:
    """Return the key in `MODELS` of the model that runs call `model`; None if the paper does not have it."""
    return next((label for label, row in MODELS.items() if model in row.known), None)


def value(table: str, model: str, row: str, dataset: str, split: str, protocol: str) -> float | None:
    """Return the paper's value in per cent, or None: it has values on the split "val", by its own protocol or its
    code's. `model` as runs call it."""
    if split != "val" or protocol not in ("paper", "official"):
        return None
    rows = TABLES.get(table, {}).get(label_of(model) or "", {})
    return rows.get(row, {}).get(dataset)

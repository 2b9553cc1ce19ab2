"""Pretrained models behind one interface: load them by name, or adapt one in memory. One file a kind of tower."""

from open_gem.towers.base import Backbone, ModuleTower, Recommended
from open_gem.towers.families import FAMILIES, ModelFamily
from open_gem.towers.loading import (
    DEFAULT_MODEL,
    DTYPES,
    EMBEDDED,
    adapt,
    as_folder,
    build,
    build_tower,
    find_device,
    find_dtype,
    is_transformers,
    list_models,
    load,
)

__all__ = [
    "DEFAULT_MODEL",
    "DTYPES",
    "EMBEDDED",
    "FAMILIES",
    "Backbone",
    "ModelFamily",
    "ModuleTower",
    "Recommended",
    "adapt",
    "as_folder",
    "build",
    "build_tower",
    "find_device",
    "find_dtype",
    "is_transformers",
    "list_models",
    "load",
]

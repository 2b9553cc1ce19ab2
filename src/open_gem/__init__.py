"""open_gem: turn any pretrained vision-language transformer into a localizer, without training.

    import open_gem

    localizer = open_gem.load()                                 # OpenAI's CLIP ViT-B/16; or load("ViT-L-14", "openai")
    result = localizer("cats.jpg", ["cat", "remote control"])   # a Localization
    result.boxes(), result.points(), result.heatmaps()["cat"]

Everything behind these names is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_gem.errors import OpenGemError as OpenGemError
    from open_gem.errors import OpenGemWarning as OpenGemWarning
    from open_gem.images.pixels import Preprocess as Preprocess
    from open_gem.images.views import Views as Views
    from open_gem.localization import Localization as Localization
    from open_gem.localization import Maps as Maps
    from open_gem.localizer import Localizer as Localizer
    from open_gem.localizer import adapt as adapt
    from open_gem.localizer import load as load
    from open_gem.method.run import Encoded as Encoded
    from open_gem.method.run import run as run
    from open_gem.method.table import METHODS as METHODS
    from open_gem.method.table import Method as Method
    from open_gem.readout import Boxes as Boxes
    from open_gem.refine.fgs import Fgs as Fgs
    from open_gem.refine.pamr import Pamr as Pamr
    from open_gem.text import Exemplar as Exemplar
    from open_gem.text import Vocabulary as Vocabulary
    from open_gem.towers import list_models as list_models
    from open_gem.trained.localizer import TrainedLocalizer as TrainedLocalizer
    from open_gem.trained.localizer import load_trained as load_trained

__version__ = "0.1.0"

_HOMES = {
    "OpenGemError": "errors",
    "OpenGemWarning": "errors",
    "Preprocess": "images.pixels",
    "Localization": "localization",
    "Maps": "localization",
    "Localizer": "localizer",
    "TrainedLocalizer": "trained",
    "adapt": "localizer",
    "list_models": "towers",
    "load": "localizer",
    "load_trained": "trained",
    "METHODS": "method.table",
    "Encoded": "method.run",
    "Method": "method.table",
    "run": "method.run",
    "Boxes": "readout",
    "Fgs": "refine.fgs",
    "Pamr": "refine.pamr",
    "Views": "images.views",
    "Exemplar": "text",
    "Vocabulary": "text",
}
__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'open_gem' has no attribute {name!r}")
    return getattr(import_module(f"open_gem.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

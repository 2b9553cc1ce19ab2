"""Models that were trained to localize, behind the same interface: what to compare a `Localizer` with."""

from open_gem.trained.localizer import TrainedLocalizer, load_trained

__all__ = ["TrainedLocalizer", "load_trained"]

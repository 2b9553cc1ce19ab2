"""Pictures with known answers: synthetic scenes that need no download."""

from open_gem.datasets.scenes import CONCEPTS, Scene, scene

__all__ = ["CONCEPTS", "Scene", "scene"]

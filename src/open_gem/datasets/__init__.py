"""Pictures with known answers: synthetic scenes that need no download."""

from open_gem.datasets.scenes import CONCEPTS, TEMPLATES, Scene, scene

__all__ = ["CONCEPTS", "TEMPLATES", "Scene", "scene"]

"""Refinements: localizations that follow the edges of the image."""

"""Modules that other tools load and call; each needs the tool that it is for."""

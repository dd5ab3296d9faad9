"""Apps: what each is made of, and which there are."""

from heliograph.apps.building import Instead
from heliograph.apps.directory import Directory

__all__ = ["Directory", "Instead"]

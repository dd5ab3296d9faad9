"""The doors for old scripts: the gateway of Apple's binary interface, and its feedback service."""

from heliograph.doors.legacy.feedback import Feedback, Turns
from heliograph.doors.legacy.gateway import Gateway

__all__ = ["Feedback", "Gateway", "Turns"]

"""The door that speaks as Apple's own servers do, for APNs libraries."""

from heliograph.doors.apple.proxy import AppleProxy

__all__ = ["AppleProxy"]

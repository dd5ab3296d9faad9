"""A provider server for Apple Push Notification service."""

__version__ = "0.1.0"

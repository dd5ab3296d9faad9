"""asyncio and TLS: shared glue without opinions."""

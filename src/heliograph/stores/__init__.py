"""Durable state: one file a database, each both Queue and Store."""

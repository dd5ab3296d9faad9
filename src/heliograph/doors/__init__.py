"""Northbound: one file a dialect."""

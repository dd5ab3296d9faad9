"""Southbound: one file or folder a carrier, each with a `carry` (see `ports.Carrier`)."""

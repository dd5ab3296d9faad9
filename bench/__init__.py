"""The figures: `python -m bench NAME`. See README.md here."""

"""Measurements of the installed fsd: `python -m bench`. Commands for people, not tests."""

"""Measurements of the installed fsd: `python -m bench`. Run by hand, not part of the tests."""

"""Doors through which guests reach an Export. They import the core, never the reverse."""

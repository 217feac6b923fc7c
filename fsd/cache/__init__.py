"""What a guest's kernel may keep for long, and how it is taken back before anybody sees it
outdated (docs/decisions/coherent.md).
"""

"""The server process itself: inherited descriptors, sandbox, log, what it leaves for the next
one.
"""

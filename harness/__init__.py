"""Shared by tests, bench/ and examples/: real mounts, shares, virtual machines and programs in
them.
"""

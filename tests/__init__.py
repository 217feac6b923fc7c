"""The tests: protocol (pure), core (no mount), mount (FUSE), guest (virtual machines), clients."""

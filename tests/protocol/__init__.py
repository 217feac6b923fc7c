"""Pure tests of the package ``protocol``: no mount, no server."""

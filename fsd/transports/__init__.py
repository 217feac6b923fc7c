"""How guests reach an Export. Transports import the core, never the reverse."""

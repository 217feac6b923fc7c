"""Who gets events; from events to orders, and the answers that make them true."""

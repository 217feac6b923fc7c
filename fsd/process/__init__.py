"""One server process: what it is given, what it is confined to, what it leaves behind."""

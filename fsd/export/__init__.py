"""One shared directory and its guests: which guests get an event, and how new marks take effect."""

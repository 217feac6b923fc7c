"""One shared directory and its guests: whose interest an event meets, and when marks are new."""

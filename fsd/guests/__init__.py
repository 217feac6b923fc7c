"""Guests: turns events into orders for agents, and answers the agents' requests as of the event."""

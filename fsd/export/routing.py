"""The last step of an event in the export: drops own echo, and gives the event to each guest that
asked.
"""

from __future__ import annotations

from collections import Counter

from protocol.masks import Mask

from ..events.event import SERVER, Event
from ..guests.guest import Guest
from ..guests.mount import MountGuest
from .arming import Arming
from .interest import Interest


class Router:
    """That of one export."""

    def __init__(self, interest: Interest, arming: Arming, counts: Counter[str]) -> None:
        self._interest = interest
        self._arming = arming
        self._counts = counts

    def route(self, event: Event) -> None:
        """Offer an event to all guests that want it."""
        if event.origin is SERVER:
            self._counts["own"] += 1
            return
        self._arming.remember(event)
        for guest in self._candidates(event):
            halves = self._interest.wanted_halves(guest, event)
            if not halves:
                continue
            if guest is event.origin:
                if not isinstance(guest, MountGuest) or not guest.history.is_awaited(event):
                    guest.count("echo", event.mask)
                    continue
                guest.count("repeated", event.mask)
            self._counts["forwarded"] += 1
            guest.count("forwarded", event.mask)
            if self._interest.follows(guest, event):
                guest.count("coalesced", event.mask)
                continue
            if not self._arming.holds(guest, event, halves):
                guest.offer(event, halves)

    def _candidates(self, event: Event) -> list[Guest]:
        """Guests with a mark on anything that the event touches (a rename touches four)."""
        guests: dict[Guest, Mask] = dict(self._interest.guests(None))
        for inode in (event.node, event.node2, event.child, event.replaced):
            if inode is not None:
                guests |= self._interest.guests(inode)
        return list(guests)

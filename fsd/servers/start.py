"""Why a server does not start. Apart because both servers and the command line need it."""

from __future__ import annotations


class StartError(Exception):
    """Why nothing can be served, in one line for the user."""

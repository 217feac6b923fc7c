"""``python -m guest_tools``: the fsd-guest command."""

import sys

from .cli import main

sys.exit(main())

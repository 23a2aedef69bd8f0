"""`python -m nonstick` is the command line."""

from __future__ import annotations

import sys

from nonstick.commands.cli import main

sys.exit(main())

"""``python -m report``."""

from __future__ import annotations

import sys

from report.command import main

sys.exit(main())

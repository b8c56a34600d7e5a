"""``python -m utils.report``."""

from __future__ import annotations

import sys

from utils.report.command import main

sys.exit(main())

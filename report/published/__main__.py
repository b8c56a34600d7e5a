"""``python -m report.published``."""

from __future__ import annotations

import sys

from report.published.leaderboard import main

sys.exit(main())

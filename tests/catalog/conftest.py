"""Lets the tests of this directory import `manifests` and `leases` by their names."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

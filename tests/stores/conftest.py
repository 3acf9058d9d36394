"""Assertions of the public suite are explained as those of a test file are; `power` can be imported by its name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
if "holdfast.testing.stores" not in sys.modules:
    pytest.register_assert_rewrite("holdfast.testing.stores")

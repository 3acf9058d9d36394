"""Assertions of the public suite are explained as those of a test file are."""

from __future__ import annotations

import sys

import pytest

if "holdfast.testing.stores" not in sys.modules:
    pytest.register_assert_rewrite("holdfast.testing.stores")

from __future__ import annotations

import time
from pathlib import Path

import holdfast
from cli_conftest import Cli  # type: ignore[import-not-found]

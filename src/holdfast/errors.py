"""The errors holdfast raises, for `except holdfast.errors.LeaseHeld` and so on; the tree is drawn in `core.errors`."""

from holdfast.core.errors import *  # noqa: F403
from holdfast.core.errors import __all__ as __all__

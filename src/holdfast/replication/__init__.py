"""Floor 4: one run in several places: copies, mirrors, scrub and repair."""

from holdfast.replication.keeper import MirrorState, MirrorStatus
from holdfast.replication.mirror import Mirror

__all__ = ["Mirror", "MirrorState", "MirrorStatus"]

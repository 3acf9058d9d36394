"""torch.distributed.checkpoint (DCP) on a run: storage objects for `dcp.save`, `dcp.async_save` and `dcp.load`, and
import and export of DCP's own directories.

What is saved is an ordinary checkpoint: whole tensors under natural names, typed values, one manifest, no pickle.
"""

from holdfast.integrations.dcp.exchange import export_dcp, import_dcp
from holdfast.integrations.dcp.reader import HoldfastReader
from holdfast.integrations.dcp.standing_in import StandingIn, in_place_of_files
from holdfast.integrations.dcp.writer import HoldfastWriter

__all__ = ["HoldfastReader", "HoldfastWriter", "StandingIn", "export_dcp", "import_dcp", "in_place_of_files"]

"""Floor 1: bytes <-> values. Nothing here opens a file; the grammar is written down in `docs/format.md`."""

"""Floor 4: what is in a checkpoint and what changed between two, block by block and in bounded memory."""

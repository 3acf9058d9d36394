"""Floor 4, behind the Checkpointer: what happens at a safe point, and who may write the run."""

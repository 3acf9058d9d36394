"""Floor 2: what a run consists of, and the acts that change it: commit, tag, retire, remove, verify."""

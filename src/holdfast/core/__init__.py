"""Floor 0: errors, clock, names, units, dtypes, progress events. Imports nothing of the house."""

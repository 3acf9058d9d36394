"""Floor 4: one run in several places: copies, mirrors, scrub and repair."""

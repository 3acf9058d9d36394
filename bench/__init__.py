"""Speed, measured against the machine's own limits and against other ways to save, in one run: `python -m bench`."""

"""What lets programs that were written for something else keep their state in a run. Each module needs what it is
named after."""

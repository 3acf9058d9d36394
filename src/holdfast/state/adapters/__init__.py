"""One module per family of live objects; torch's are imported only once the program has imported torch."""

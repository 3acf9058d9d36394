"""One module per family of live objects; the torch ones are imported only once the program has imported torch."""

"""Frameworks that own the loop, the launch or the storage: one thin file each."""

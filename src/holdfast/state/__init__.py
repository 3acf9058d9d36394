"""Capture live objects as plain values and tensor bytes, and put them back exactly."""

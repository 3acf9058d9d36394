"""Memory of another machine as a store: a small service over TCP, and the store that speaks to it.

The protocol is described in docs/reference/peer-protocol.md. It authenticates both sides and every frame by a shared
secret, and encrypts nothing.
"""

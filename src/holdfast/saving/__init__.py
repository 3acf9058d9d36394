"""Floor 3, downwards: snapshot -> digest -> data files -> manifest. A byte goes one way, from tensor to disk."""

"""Dynamic and static memory, Eq. (1) to (5), and the bytes of a feature."""

"""The archive's cellars: where memories are kept, behind one protocol."""

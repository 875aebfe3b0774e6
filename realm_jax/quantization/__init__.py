"""Model files written anew: in other types, by the importance of columns, and with adapters folded in."""

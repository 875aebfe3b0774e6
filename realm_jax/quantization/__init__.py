"""Model files in smaller types: which tensor gets which, the importance of columns, and the writing."""

"""Faster, exact forms of plain torch code. A file also holds the plain form where torch has none."""

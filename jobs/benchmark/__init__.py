"""Measurements that print their figures, each a ratio against a peer in the same process."""

"""A Ray cluster of several hosts on one Linux machine: each host a network namespace with an address of its own."""

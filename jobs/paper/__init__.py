"""The tables of the Sana paper that can be checked here: each prints ours beside the published numbers."""

"""One short script per stage, for `python -m jobs.<stage>` and `ray job submit --working-dir . -- python -m jobs.<stage>`."""

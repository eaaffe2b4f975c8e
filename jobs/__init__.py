"""One short script per stage, each a Ray job: `python -m jobs.<stage> --help`."""

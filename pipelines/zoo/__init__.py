"""Makes and measures the tiny checkpoints of `sana_model/zoo`: `python -m jobs.zoo --help`."""

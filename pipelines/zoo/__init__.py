"""How the tiny checkpoints of `sana_model/zoo` are made and measured: `python -m jobs.zoo --help`."""

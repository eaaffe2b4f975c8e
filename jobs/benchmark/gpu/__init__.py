"""All that a short time on a GPU should answer, in one command: `python -m jobs.benchmark gpu`."""

"""The data stages and the training, on Ray."""

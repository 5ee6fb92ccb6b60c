"""The training engine: processes, randomness, loaders, precision, the loop, records; each file one subject."""

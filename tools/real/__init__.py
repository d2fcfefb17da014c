"""A real language model, end to end: `make real`."""

"""Data sets: samples and batches, and the ways to read them."""

"""Prediction after training: images of any size, and files of what was predicted."""

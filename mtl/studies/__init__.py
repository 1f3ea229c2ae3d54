"""Measurements that end in a table of the README."""

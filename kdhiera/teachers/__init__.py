"""Frozen teachers, one family a file."""

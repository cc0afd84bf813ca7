"""Transformations of a captured program."""

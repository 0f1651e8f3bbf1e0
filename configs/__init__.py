"""Validated settings, the files that hold them, and the shipped recipes."""

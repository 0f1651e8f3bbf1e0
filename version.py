"""The version, importable without importing anything else (setuptools reads it from here)."""

__version__ = "0.1.0"

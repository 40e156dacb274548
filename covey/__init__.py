"""Covey: a highly available build cloud. See docs/architecture.md."""

__version__ = "0.3.0"

"""Paperscale: a paper is one file; everything it needs to run on a cluster is shared."""

__version__ = "0.1.0"

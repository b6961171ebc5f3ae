"""Weights in and out: layouts, file formats, downloads."""

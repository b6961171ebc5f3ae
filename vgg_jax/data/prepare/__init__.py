"""Preparation of data sets: written to disk in array_record format, without TensorFlow."""

"""Measurements behind the figures in the documents: ``python -m benchmarks.NAME``, each with its bars."""

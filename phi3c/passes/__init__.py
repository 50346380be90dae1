"""Relax passes, one rewrite (or one reading) per file. They know nothing of the model."""

"""Runs an artifact: library, parameters, paged KV cache. Needs only TVM's runtime."""

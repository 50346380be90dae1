"""Phi-3 as Relax modules, with Hugging Face's parameter names."""

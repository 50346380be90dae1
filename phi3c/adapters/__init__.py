"""LoRA adapters (Hu et al. 2021) as data: their shapes, files and weights. Both wings import it."""

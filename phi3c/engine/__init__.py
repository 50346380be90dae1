"""The serving engine: tokenizer, sampler, sequences, scheduler and the step loop."""

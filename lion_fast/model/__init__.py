"""The parts of `LionForCausalLM`: towers, aggregator, adapters, and what runs them on the kernels."""

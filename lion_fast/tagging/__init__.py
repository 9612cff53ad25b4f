"""Taggers, whose tags go into the prompt: RAM, and zero-shot with any CLIP-like model."""

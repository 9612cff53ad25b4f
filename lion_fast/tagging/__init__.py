"""Taggers, whose tags go into the prompt: RAM, and a zero-shot tagger around any CLIP-like model."""

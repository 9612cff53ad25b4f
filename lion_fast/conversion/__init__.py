"""Conversion of published checkpoints to directories that `from_pretrained` loads."""

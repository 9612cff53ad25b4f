"""Published checkpoints into directories that `from_pretrained` loads."""

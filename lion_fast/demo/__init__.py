"""A page to try LION on: `lion-fast demo`."""

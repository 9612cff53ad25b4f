"""A web page to try LION: `lion-fast demo`."""

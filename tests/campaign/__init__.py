"""Seeded campaigns of hostile inputs against every boundary of the library; see `tests/campaign/running.py`."""

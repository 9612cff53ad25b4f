"""The tasks of the adapters' routers."""

TASKS = ("region_level", "image_level")  # index = task id = row of the routers' tables

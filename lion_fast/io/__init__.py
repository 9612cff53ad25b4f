"""Images, boxes, checkpoint files and atomic writing; independent of the rest of the package."""

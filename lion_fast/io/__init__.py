"""Images, boxes, checkpoint files and atomic writing; imports nothing else of this package."""

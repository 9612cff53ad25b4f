"""The instructions that LION was trained with, word for word where the published model expects them."""

CAPTION_INSTRUCTION = "Please describe the image using a single short sentence."
# "<image>" stands in the text as it is; nothing is put in its place.
LOCATE_INSTRUCTION = "In the image <image>, can you locate {expression} and let me know its coordinates?"
# No published model is known to expect this one.
REGION_INSTRUCTION = "In the image <image>, what is the object at {box}?"

"""The tag sentence and the instructions of LION, verbatim where the published models were trained with them."""

TAG_SENTENCE = "According to {soft_prompt}, you are allowed to use or partially use the following tags: [{tags}]. "
CAPTION_INSTRUCTION = "Please describe the image using a single short sentence."
# "<image>" is literal text; nothing replaces it.
LOCATE_INSTRUCTION = "In the image <image>, can you locate {expression} and let me know its coordinates?"
# No published model is known to have been trained with this instruction.
REGION_INSTRUCTION = "In the image <image>, what is the object at {box}?"

"""What the server of forked test processes does once, so that each of them need not: see `processes.starting`."""

import gc
import tempfile

import torch
from PIL import Image

from lion_fast import LionForCausalLM
from tests.lion_fast.tiny import make_model

torch.set_num_threads(1)  # a process that is forked while others compute would wait for them forever
Image.init()
with tempfile.TemporaryDirectory() as folder:
    make_model().save_pretrained(folder)
    LionForCausalLM.from_pretrained(folder)
gc.collect()
gc.freeze()  # so that no process looks through the libraries' objects

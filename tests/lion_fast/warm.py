"""Work that the server of forked test processes does once, instead of each process (`processes.starting`)."""

import gc
import tempfile

import torch
from PIL import Image

from lion_fast import LionForCausalLM
from tests.lion_fast.tiny import make_model

torch.set_num_threads(1)  # threads do not survive a fork, and a forked process would wait for them forever
Image.init()
with tempfile.TemporaryDirectory() as folder:
    make_model().save_pretrained(folder)
    LionForCausalLM.from_pretrained(folder)
gc.collect()
gc.freeze()  # so that garbage collection in the forked processes skips the libraries' objects

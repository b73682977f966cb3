"""`SEED_OFFSET=1 python -m pytest`: other initial weights in all processes that import this, which no test may mind."""

import os

import torch

if offset := int(os.environ.get("SEED_OFFSET", "0")):
    torch.manual_seed = lambda seed, plain=torch.manual_seed: plain(seed + offset)

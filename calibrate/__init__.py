"""Offline calibration: turn a Hugging Face LLM into a SliderQuant checkpoint. Never imports vLLM."""

import os

# Read when torch is imported: tensors of some megabytes come and go by the thousand, huge pages come faster.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

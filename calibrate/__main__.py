"""``python -m calibrate``."""

import os
import sys

# Read when torch is imported: tensors of some megabytes come and go by the thousand, huge pages come faster.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from calibrate.cli import main

sys.exit(main())

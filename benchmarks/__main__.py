"""`python -m benchmarks` is `boneage-benchmark`."""

import sys

from .cli import main

sys.exit(main())

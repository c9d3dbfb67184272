"""`python -m xpo_fast.cli`: what torchrun starts."""

import sys

from . import main

sys.exit(main())

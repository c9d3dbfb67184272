"""`python -m xpo_fast.cli`: what torchrun starts."""

import sys

from .main import main

sys.exit(main())

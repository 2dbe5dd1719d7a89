"""``python -m spectra.cli``."""

import sys

from spectra.cli import main

sys.exit(main())

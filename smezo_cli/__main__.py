"""`python -m smezo_cli` is `smezo`."""

import sys

from smezo_cli.cli.verbs import main

sys.exit(main())

"""`python -m jobs.demo`."""

import sys

from jobs.demo.main import main

sys.exit(main())

"""python -m budwood.cli"""

import sys

from . import main

sys.exit(main())

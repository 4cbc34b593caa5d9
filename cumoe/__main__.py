"""`python -m cumoe`: see :mod:`cumoe.cli`.

The guard matters: worker processes that compile kernels import this module again.
"""

import sys

if __name__ == "__main__":
    from cumoe.cli import main

    sys.exit(main())

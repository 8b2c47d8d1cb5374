"""``python -m dfqs_nb``: the same as the command ``dfqs-nb``."""

import sys

from dfqs_nb.workbook.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m dfqs_nb``: the same as the command ``dfqs-nb``."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the current folder, whose llama_cpp/ or numpy/ is not ours

from dfqs_nb.workbook.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())

"""``python -m dfqs_nb``: the same as the command ``dfqs-nb``."""

import sys


def main() -> int:
    """Run one command and return its exit status; an interrupt before it has begun needs no words."""
    try:
        from dfqs_nb.workbook.cli import main
    except KeyboardInterrupt:
        return 130
    return main()


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the current folder, whose llama_cpp/ or numpy/ is not ours
    sys.exit(main())

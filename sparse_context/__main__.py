"""`python -m sparse_context` is the command `sparse-context`."""

import sys

from .layers import MissingPackageError, explain_missing_packages


def main() -> None:
    """Run the command. Where a package of its layer is missing, one sentence on stderr and exit code 2."""
    try:
        with explain_missing_packages():
            from .cli import main as run

            run()
    except MissingPackageError as error:
        print(f"sparse-context: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

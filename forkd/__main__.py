"""Where forkd begins: chooses between the compiled modules and their sources, before any of them is imported."""

import sys

from forkd import compiled


def main() -> int:
    """Run forkd; returns the exit status."""
    why_not = compiled.prefer()
    from forkd import cli  # noqa: PLC0415

    return cli.main(why_not_compiled=why_not)


if __name__ == "__main__":
    sys.exit(main())

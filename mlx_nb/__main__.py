"""`python -m mlx_nb` is `mlx-nb`. What it needs is imported where an interrupt is one line."""

import sys


def main() -> int:
    """Run the command line of this process. Returns the exit status."""
    try:
        from mlx_nb import cli

        return cli.main()
    except KeyboardInterrupt:
        print("mlx-nb: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())

"""``python -m adfify``."""

from adfify.cli import main

main()

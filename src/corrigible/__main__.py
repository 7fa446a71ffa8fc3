"""``python -m corrigible`` is ``corrigible``."""

from corrigible.cli import main

main()

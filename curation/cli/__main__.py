"""`python -m curation.cli` is the command `curation`."""

from curation.cli.main import main

main()

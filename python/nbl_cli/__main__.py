"""`python -m nbl_cli` is the command `nbl`."""

from .app import main

main()

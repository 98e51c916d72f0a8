"""`python -m nbl` is the command `nbl`, but that Python imports this package, and torch, first."""

from nbl_cli.app import main

main()

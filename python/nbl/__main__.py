"""`python -m nbl` is the command `nbl`."""

from nbl_cli.app import main

main()

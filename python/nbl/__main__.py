"""`python -m nbl` is the command `nbl`."""

from nbl.cli import main

main()

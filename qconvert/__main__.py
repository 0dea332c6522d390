"""`python -m qconvert` is `qconvert`."""

from qconvert.cli import main

main()

"""Trains and evaluates: `python launch.py --help`."""

import sys

from rlhf_exp.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

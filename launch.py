"""Entry point of training and evaluation: `python launch.py --help`."""

import sys

from rlhf_exp.hydra_app import main
from rlhf_exp.processes.failures import exit_after

if __name__ == "__main__":
    exit_after(lambda: main(sys.argv[1:]))

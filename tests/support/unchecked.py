"""search.py without its checks, to test what comes after them, with other trials and data."""

import sys

import search
from nnisearch import cli

if __name__ == "__main__":
    sys.exit(cli.main(project=search.PROJECT, check=lambda *_: None))

"""Choose the trial to keep from a search: half a point of accuracy counts as equally good."""

from nnisearch.after.choose import main

if __name__ == "__main__":
    main(prog="choose.py", within=0.5)

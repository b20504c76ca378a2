"""Choose the trial to keep from a search; results within half a point count as equal."""

from nnisearch.results.choose import main

if __name__ == "__main__":
    main(prog="choose.py", within=0.5)

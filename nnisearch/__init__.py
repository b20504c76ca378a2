"""Start and show searches of NNI, of any project: safely, on any machine, and without idle time.

cli.py is the command; it reads from the top down, and imports point down only.
"""

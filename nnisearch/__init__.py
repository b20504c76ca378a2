"""Starts and shows searches of NNI, of any project: safely, on any machine, and without idle time.

cli.py is the command. The rooms are in the order of a search, and imports point up this list:

    shared/    what several rooms need: text, output, signals, processes, results
    before/    reads the configuration, and refuses what cannot work
    start/     starts NNI's manager, or resumes a search
    manager/   what is loaded into NNI's own processes
    watch/     shows a search while it runs
    after/     chooses a trial, prints the table, draws the plot

tuners.py has the tuners that a configuration can name: Optuna's samplers and a mended Hyperband.
"""

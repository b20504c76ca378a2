"""Starts any project's NNI search, and watches it: safely, on any machine, without idle time.

cli.py is the command. The packages follow the stages of a search; each imports only from above:

    shared/    serves several stages: text, output, signals, processes, results
    before/    reads the configuration, and refuses what cannot work
    start/     starts NNI's manager, or resumes a search
    manager/   is loaded into NNI's own processes, and fixes their faults
    watch/     shows a search while it runs
    after/     chooses a trial, prints the table, draws the plot

tuners.py has tuners that a configuration can name: Optuna's samplers.
"""

"""The parts of train.py: data, batch, optimizers, hyperparameters, processes; start and fast."""

"""The parts of train.py. Start with data.py and batch.py; fast.py may be deleted."""

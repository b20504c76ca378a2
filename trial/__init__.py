"""The parts of train.py. Start with images.py and data.py; fast.py may be deleted."""

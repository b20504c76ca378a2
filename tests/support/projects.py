"""Another project: its trial and its configuration."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
TRIAL = (SUPPORT / "other_project.py").read_text()
CONFIG = {
    "searchSpace": {"x": {"_type": "uniform", "_value": [0, 1]}},
    "trialCommand": "python3 trial.py",
    "trialConcurrency": 2,
    "maxTrialNumber": 2,
    "tuner": {"name": "Random"},
    "trainingService": {"platform": "local"},
}

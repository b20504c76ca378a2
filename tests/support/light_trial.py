"""A trial for tests of searches: it reports and prints like train.py, but computes nothing.

light_trial.py [EPOCHS]     # where the search space has no epochs
"""

import json
import sys
import time

from other_project import GIVEN, report

if __name__ == "__main__":
    given = GIVEN["parameters"]
    print("Hyperparameters:", json.dumps(given))
    epochs = given.get("epochs") or int(sys.argv[1])
    for number in range(2 * epochs):
        time.sleep(0.2)
        epoch, batch = number // 2 + 1, number % 2 * 50 + 50
        loss = 2.3 - given["lr"] * (epoch + batch / 1000)
        print(f"[{epoch}, {batch:5d}] loss: {loss:.3f}", flush=True)
        report("PERIODICAL", loss, number)
    accuracy = round(50 + 100 * given["lr"], 3)
    print(f"Acc: {accuracy:.3f}%")
    report("FINAL", accuracy)

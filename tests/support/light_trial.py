"""A trial for tests of searches: it reports and prints like train.py, but computes nothing.

light_trial.py [EPOCHS]     # where the search space has no epochs
"""

import json
import sys
import time

from nnisearch.shared.imports import without_pandas

with without_pandas():
    import nni

if __name__ == "__main__":
    given = nni.get_next_parameter()
    print("Hyperparameters:", json.dumps(given))
    epochs = given.get("epochs") or int(sys.argv[1])
    for epoch in range(1, epochs + 1):
        for number in (50, 100):
            time.sleep(0.2)
            loss = 2.3 - given["lr"] * (epoch + number / 1000)
            print(f"[{epoch}, {number:5d}] loss: {loss:.3f}", flush=True)
            nni.report_intermediate_result(loss)
    accuracy = round(50 + 100 * given["lr"], 3)
    print(f"Acc: {accuracy:.3f}%")
    nni.report_final_result(accuracy)

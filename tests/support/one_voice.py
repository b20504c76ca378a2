"""train.py, where only the first of several processes has NNI's functions: one_voice.py TUNED FLAGS

They print what they are given.
"""

import json
import os
import sys

import nni

import train

if os.environ["RANK"] == "0":
    nni.get_next_parameter = lambda: json.loads(sys.argv[1])
    nni.report_intermediate_result = lambda value: print("intermediate:", value)
    nni.report_final_result = lambda value: print("final:", value)
else:
    nni.get_next_parameter = nni.report_intermediate_result = nni.report_final_result = None
train.main(sys.argv[2:])

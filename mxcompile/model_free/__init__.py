"""Quantize a checkpoint to a checkpoint, tensor by tensor, without a model in memory.

quantize_files.py   the call: plan, then files
plan.py             what will be done to each tensor
traced_plan.py      found by tracing the model without values, and running the recipe on that
guessed_plan.py     for an architecture that cannot be traced: found by shapes and names
rounding.py         the values of one tensor, and of the next ones at the same time
"""

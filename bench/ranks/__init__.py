"""Several processes, the ranks, that save one state under torchrun.

desk.py          in a contestant's worker: its launch, and what all its ranks found
rank.py          the program of each rank
limits.py        what the machine can do when every rank copies, writes and reads at once
timing.py        its clock
states.py        what is saved: a model and its optimizer under FSDP2; very many small tensors
"""

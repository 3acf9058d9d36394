"""Speed, measured against the machine's own limits and against other ways to save, in one run: `python -m bench`.

__main__.py      options; runs the cases and writes the results
cases/           what is measured: one file per case
contestants/     who is measured: one file per way to save; __init__.py lists them
limits.py        what the machine itself can do, measured in the same rounds
worker.py        the process that each contestant of a case has to itself
states.py        what is saved
devices.py       where it is, and how clocks wait for that
desks.py         a contestant, a state and the clock; timing.py: what a clock begins with
ranks/           the same with several processes, the ranks, under torchrun
figures.py       raw figures of every round, medians, ratios
report.py, chart.py, machine.py    tables, bars, what was measured on which machine
"""

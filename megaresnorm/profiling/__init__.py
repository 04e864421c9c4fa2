"""Where a step's time and memory go: by block and branch, by rank, on one line of time.

rows, timeline    what time is charged to; marks that cut a rank's time, by the host's clock or a GPU's events
marked, traffic   where a model, an engine and its messages are marked, wrapped from outside for single steps
memory            bytes of each row, in a step of their own
measures          what one rank has measured; profile: what all ranks have, as one document; findings: what stands out
window            which steps of a run are measured (train.profile, megaresnorm profile)
outputs, trace    the files; show: the tables, and what has changed since another profile
"""

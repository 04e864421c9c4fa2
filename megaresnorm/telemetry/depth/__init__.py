"""What depth does to a model while it trains: figures by sub-layer and block (depth.jsonl), and warnings.

recorder               what the training loop calls: which steps are watched and probed, the records, the warnings
watch                  the cheap figures, of a step that is trained anyway
streams                the sums that they are made of: of trunks, contributions, and gradients of the stream
scores                 attention's scores: the largest, and the entropy of its probabilities
sums                   sums of all ranks, in few collectives
figures                from sums to figures
probe, paths           the dear figures, of a fixed batch between steps
alarms                 what is warned of
records                depth.jsonl
"""

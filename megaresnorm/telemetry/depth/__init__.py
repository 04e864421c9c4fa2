"""What depth does to a model while it trains: figures by sub-layer and block (depth.jsonl), and warnings.

recorder               what the training loop calls: which steps are watched and probed, the records, the warnings
watch                  the cheap figures, of a step that is trained anyway
streams                the sums that they are made of: of trunks, contributions, and gradients of the stream
scores                 attention's scores: the largest, and the entropy of its probabilities
rows, scratch          rows that are sampled, and memory that is used again
tensors                gradients and updates of parameters, by block and class
figures                from sums of all ranks to figures
probe, paths           the dear figures, of a fixed batch between steps
alarms                 what is warned of
records                depth.jsonl
"""

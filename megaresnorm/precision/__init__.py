"""Number formats: products and weights in fewer bits than FP32, what they need, and what they lose.

dtypes                 the types that a recipe names
half                   products in BF16 and FP16, and 16-bit copies of weights
fp8, delayed           products in FP8, and scales from earlier steps
copies                 all copies of weights, which are renewed once a step: half's, and those in FP8
fp8_weights            FP8 codes of whole weights; fp8_shards: of those that FSDP2 shards and gathers
loss_scale             of FP16
rounded_updates        weights in BF16 alone, rounded stochastically
watched, counting      what is saturated and underflown, counted at some steps (telemetry/numbers.py records it)
"""

"""Checkpoints to and from the formats of Hugging Face Transformers and Megatron-Core, and from DeepSpeed's.

Read in this order: ``fields``, ``family`` and ``families`` say which keys the config.json of an architecture has and
how its tensors are named, ``rows`` in which order their rows are. ``signature`` says what a model computes, from which
``match`` finds the architecture that holds it, with the constants that are folded into weights. ``links`` moves rows in
either direction, a chunk at a time, ``tensors`` finds what they need in files. ``export`` writes a folder, ``to_hf``
and ``from_hf`` (with ``describe``) put it all together, ``compare`` judges the result. ``from_deepspeed`` reads what
its script writes, of a model of Transformers or of ours; ``deepspeed_files`` knows its folders. ``remote`` and
``modeling_megaresnorm`` are our own architecture for Transformers. Beneath them are ``native`` (our checkpoints),
``files`` (folders of safetensors), ``config_json`` and ``tokenizers``.
"""

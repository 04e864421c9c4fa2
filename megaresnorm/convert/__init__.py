"""Checkpoints to and from the formats of Hugging Face Transformers and Megatron-Core.

Read in this order: ``fields`` and ``families`` say what the config.json of an architecture has and what its tensors are called,
``rows`` in which order their rows are; ``signature`` says what a model computes, and so ``plan`` which architecture holds it, with
``fold`` and ``remainder`` for constants that move into weights; ``links`` moves rows in either direction, a chunk at a time.
``to_hf`` and ``from_hf`` (with ``describe``) put it together, ``compare`` and ``loading`` judge the result. ``remote`` and
``modeling_megaresnorm`` are our own architecture for Transformers, ``megatron`` is Megatron-Core's. Beneath them are ``native``
(our checkpoints), ``files`` (folders of safetensors), ``config_json``, ``tokenizers``, ``resolved`` (settings with their defaults)
and ``card`` (the README of an exported model).
"""

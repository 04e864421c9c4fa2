"""The architectures of Transformers that hold our models, one table each, used in both directions.

Whether an architecture holds a model exactly is not written down: it does if the model that is read back from its
config.json computes the same (``signature``). So a table says only what the architecture has.
"""

from megaresnorm.convert.families import layernorm, rms
from megaresnorm.convert.family import Family

# In the order in which ``auto`` tries them: among classes that hold the same model, most programs know the first.
FAMILIES: tuple[Family, ...] = (
    rms.llama,
    rms.qwen2,
    rms.qwen3,
    rms.granite,
    rms.glm4,
    rms.olmo2,
    rms.minimax,
    layernorm.gpt2,
    layernorm.gpt_neox,
    layernorm.starcoder2,
    layernorm.stablelm,
    layernorm.opt_post,
    layernorm.opt_pre,
    layernorm.bert,
    rms.gemma2,
    rms.gemma3,
    rms.mistral,
    rms.olmo3,
)

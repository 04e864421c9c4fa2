"""megatron-core's own GPTModel on a folder that we have written, and a folder that is written from it.

Run as a program:

    python megatron_model.py FOLDER OUT TOKENS LOGITS

OUT gets what a Megatron job would write by the lines in docs/conversion.md. Megatron expects a GPU; what it makes there
is made on the CPU.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file


def load_logits(folder: Path, out: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    torch.cuda.current_device = lambda: torch.device("cpu")
    zeros = torch.zeros
    torch.zeros = lambda *size, device=None, **rest: zeros(*size, device="cpu" if device == "cuda" else device, **rest)
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.transformer_config import TransformerConfig

    CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()  # of dropout, which there is none of
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    config = json.loads((folder / "config.json").read_text())
    functions = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
    of_config = (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
        "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "add_bias_linear", "add_qkv_bias",
        "gated_linear_unit", "qk_layernorm", "rotary_interleaved", "apply_residual_connection_post_layernorm",
    )  # fmt: skip
    of_model = (
        "vocab_size", "max_sequence_length", "position_embedding_type", "rotary_percent", "rotary_base", "rope_scaling",
        "share_embeddings_and_output_weights", "seq_len_interpolation_factor",
    )  # fmt: skip
    transformer = TransformerConfig(
        **{key: config[key] for key in of_config},
        activation_func=functions[config["activation_func"]],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization=config["normalization"], qk_layernorm=config["qk_layernorm"])
    model = GPTModel(config=transformer, transformer_layer_spec=spec, **{key: config[key] for key in of_model}).eval()
    assert config["transformer_impl"] == "local"
    found = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not found.unexpected_keys and all(key.endswith("_extra_state") for key in found.missing_keys), found
    out.mkdir()
    tensors = {name: t.contiguous() for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    if config["share_embeddings_and_output_weights"]:
        tensors.pop("output_layer.weight", None)
    # As Megatron pads a vocabulary.
    tensors["embedding.word_embeddings.weight"] = F.pad(
        tensors["embedding.word_embeddings.weight"], (0, 0, 0, 11), value=7.0
    )
    save_file(tensors, out / "model.safetensors")
    names = ["model_type", "transformer_impl", "activation_func", *of_config, *of_model]
    (out / "config.json").write_text(json.dumps({name: config[name] for name in names}))
    seq = tokens_BS.shape[1]
    mask = torch.ones(seq, seq, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return model(tokens_BS, torch.arange(seq)[None].expand_as(tokens_BS), mask)


if __name__ == "__main__":
    folder, out, tokens, logits = map(Path, sys.argv[1:])
    save_file({"logits": load_logits(folder, out, load_file(tokens)["tokens"]).contiguous()}, logits)

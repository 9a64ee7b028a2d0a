"""A Llama-3-8B-shaped checkpoint of random bf16 weights, made on the GPU host itself: no such file fits a repository.

    python3 test/gpu/make_llama.py OUT [layers]        # 16 GB with its 32 layers

Weights are normal, scaled so that activations neither die nor explode; the tokenizer is that of fixtures/v1.0 (its ids
are the first of the vocabulary).
"""
import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file

out = pathlib.Path(sys.argv[1])
layers = int(sys.argv[2]) if len(sys.argv) > 2 else 32
hidden, inner, heads, kv_heads, vocab = 4096, 14336, 32, 8, 128256
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
out.mkdir(parents=True, exist_ok=True)


def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
    return (torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * scale).cpu()


index = {}
fan = hidden**-0.5


def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, out / name, metadata={"format": "pt"})
    index.update({key: name for key in tensors})


save("model-outer.safetensors", {
    "model.embed_tokens.weight": normal(vocab, hidden, 1.0),
    "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    "lm_head.weight": normal(vocab, hidden, fan),
})
for i in range(layers):
    p = f"model.layers.{i}."
    save(f"model-{i:05d}.safetensors", {
        p + "input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        p + "post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        p + "self_attn.q_proj.weight": normal(hidden, hidden, fan),
        p + "self_attn.k_proj.weight": normal(hidden * kv_heads // heads, hidden, fan),
        p + "self_attn.v_proj.weight": normal(hidden * kv_heads // heads, hidden, fan),
        p + "self_attn.o_proj.weight": normal(hidden, hidden, fan),
        p + "mlp.gate_proj.weight": normal(inner, hidden, fan),
        p + "mlp.up_proj.weight": normal(inner, hidden, fan),
        p + "mlp.down_proj.weight": normal(hidden, inner, inner**-0.5),
    })
(out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
(out / "config.json").write_text(json.dumps({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
    "num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "vocab_size": vocab,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}))
fixtures = pathlib.Path(__file__).resolve().parents[2] / "fixtures" / "v1.0"
for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(fixtures / name, out / name)

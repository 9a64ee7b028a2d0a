"""One DeepSeek-V3-shaped layer (MLA, 256 experts of which 8 are on, one shared) of random bf16 weights, made on the GPU
host itself: 24 GB.

    python3 test/gpu/make_deepseek.py OUT [experts]
"""
import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file

out = pathlib.Path(sys.argv[1])
experts = int(sys.argv[2]) if len(sys.argv) > 2 else 256
hidden, inner, heads, vocab, q_rank, kv_rank, nope, rope, value = 7168, 2048, 128, 16384, 1536, 512, 128, 64, 128
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
out.mkdir(parents=True, exist_ok=True)


def normal(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * columns**-0.5).cpu()


def ones(n: int) -> torch.Tensor:
    return torch.ones(n, dtype=torch.bfloat16)


def feed_forward(prefix: str) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.gate_proj.weight": normal(inner, hidden),
        f"{prefix}.up_proj.weight": normal(inner, hidden),
        f"{prefix}.down_proj.weight": normal(hidden, inner),
    }


index = {}


def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, out / name, metadata={"format": "pt"})
    index.update({key: name for key in tensors})


p = "model.layers.0."
save("model-outer.safetensors", {
    "model.embed_tokens.weight": normal(vocab, hidden) * hidden**0.5,
    "model.norm.weight": ones(hidden),
    "lm_head.weight": normal(vocab, hidden),
    p + "input_layernorm.weight": ones(hidden),
    p + "post_attention_layernorm.weight": ones(hidden),
    p + "self_attn.q_a_proj.weight": normal(q_rank, hidden),
    p + "self_attn.q_a_layernorm.weight": ones(q_rank),
    p + "self_attn.q_b_proj.weight": normal(heads * (nope + rope), q_rank),
    p + "self_attn.kv_a_proj_with_mqa.weight": normal(kv_rank + rope, hidden),
    p + "self_attn.kv_a_layernorm.weight": ones(kv_rank),
    p + "self_attn.kv_b_proj.weight": normal(heads * (nope + value), kv_rank),
    p + "self_attn.o_proj.weight": normal(hidden, heads * value),
    p + "mlp.gate.weight": normal(experts, hidden),
    p + "mlp.gate.e_score_correction_bias": torch.zeros(experts),
    **feed_forward(p + "mlp.shared_experts"),
})
for first in range(0, experts, 32):
    shard = {}
    for e in range(first, min(first + 32, experts)):
        shard |= feed_forward(f"{p}mlp.experts.{e}")
    save(f"model-{first:05d}.safetensors", shard)
(out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
(out / "config.json").write_text(json.dumps({
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": hidden, "vocab_size": vocab,
    "intermediate_size": 18432, "moe_intermediate_size": inner, "num_hidden_layers": 1, "first_k_dense_replace": 0,
    "num_attention_heads": heads, "num_key_value_heads": heads, "q_lora_rank": q_rank, "kv_lora_rank": kv_rank,
    "qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": value, "n_routed_experts": experts,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "hidden_act": "silu",
    "max_position_embeddings": 8192, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "attention_bias": False,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}))
fixtures = pathlib.Path(__file__).resolve().parents[2] / "fixtures" / "v1.0"
for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(fixtures / name, out / name)

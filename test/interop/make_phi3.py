"""A small random Phi-3 as transformers saves it. Usage: make_phi3.py FOLDER WINDOW (0: none)"""
import json
import sys

import torch
from transformers import Phi3Config, Phi3ForCausalLM

torch.manual_seed(5)
config = Phi3Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=64, initializer_range=0.2,
    bos_token_id=0, eos_token_id=1, pad_token_id=2, sliding_window=int(sys.argv[2]) or None,
)
model = Phi3ForCausalLM(config)
model.save_pretrained(sys.argv[1])
print(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}))

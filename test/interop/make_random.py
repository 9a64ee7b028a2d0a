"""A small random model as transformers saves it, with the tokenizer of another. Usage: make_random.py FOLDER TYPE HIDDEN
TOKENIZER_FOLDER; TYPE: qwen2, mixtral."""
import json
import os
import shutil
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

folder, kind, hidden, tokenizer = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
vocab = json.load(open(os.path.join(tokenizer, "config.json")))["vocab_size"]
torch.manual_seed(6)
config = AutoConfig.for_model(
    kind, vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.06, bos_token_id=0, eos_token_id=1,
    **({"num_local_experts": 4} if kind == "mixtral" else {}),
)
model = AutoModelForCausalLM.from_config(config)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.06)
model.to(torch.bfloat16).save_pretrained(folder)
for name in ("tokenizer.json", "tokenizer_config.json"):
    if os.path.exists(os.path.join(tokenizer, name)):
        shutil.copy(os.path.join(tokenizer, name), folder)
print(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}))

"""Logits of tokens by transformers, f32 row by row. Usage: logits.py FOLDER TOKENS.json LOGITS.f32"""
import json
import sys

import torch
from transformers import AutoModelForCausalLM

folder, tokens_file, logits_file = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
with torch.no_grad():
    logits = model(torch.tensor(json.load(open(tokens_file)))).logits.float()
logits.numpy().astype("<f4").tofile(logits_file)
print(json.dumps({"model": type(model).__name__}))

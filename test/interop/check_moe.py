"""usage: check_moe.py FOLDER TOKENS   Logits of a checkpoint by transformers in fp32, names that it missed, four generated tokens."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(2)
folder, tokens = sys.argv[1], torch.tensor([json.loads(sys.argv[2])])
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
names = {k: sorted(map(str, v)) for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
with torch.no_grad():
    logits = model.eval()(input_ids=tokens).logits[0]
    generated = model.generate(tokens[:, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, 8:]
print(json.dumps({"logits": logits.flatten().tolist(), "names": names, "generated": generated.tolist()}))

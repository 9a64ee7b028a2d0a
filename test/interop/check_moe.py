"""usage: check_moe.py FOLDER TOKENS [LOUDER]

Logits of a checkpoint by transformers in fp32, names that it missed, four generated tokens. LOUDER: a copy of the checkpoint
with its routers times 1000 is written there first, and computed. The tiny logits of unit weights leave ties in fp32, which
everybody breaks in a way of their own; the copy has none.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(2)
folder, tokens = sys.argv[1], torch.tensor([json.loads(sys.argv[2])])
if len(sys.argv) > 3:
    folder = shutil.copytree(folder, sys.argv[3])
    for file in Path(folder).glob("*.safetensors"):
        tensors = load_file(file)
        save_file({k: 1000 * v if ".mlp.gate." in k else v for k, v in tensors.items()}, file, metadata={"format": "pt"})
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
names = {k: sorted(map(str, v)) for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
with torch.no_grad():
    logits = model.eval()(input_ids=tokens).logits[0]
    generated = model.generate(tokens[:, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, 8:]
print(json.dumps({"logits": logits.flatten().tolist(), "names": names, "generated": generated.tolist()}))

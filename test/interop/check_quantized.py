"""Unpacks quantized folders by code of its own and runs the result in transformers. Prints JSON.

Usage: check_quantized.py ROOT TOKENS.json LOGITS.f32
ROOT holds the folders compressed-tensors, gptq, awq, safetensors (those that are there are checked). Their weights must
be the same; the dequantized compressed-tensors folder gives the logits of TOKENS (f32, row by row).
Layouts: compressed-tensors pack-quantized (schema 0.18), GPTQ v1/v2 (AutoGPTQ's qlinear), AWQ gemm (AutoAWQ's pack).
"""
import json
import os
import sys
import tempfile

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def nibbles(words: np.ndarray) -> np.ndarray:
    """int32 [..., W] -> uint8 [..., 8 W], low bits first."""
    unsigned = words.astype(np.int64) & 0xFFFFFFFF
    parts = [(unsigned >> (4 * i)) & 15 for i in range(8)]
    return np.stack(parts, axis=-1).reshape(*words.shape[:-1], -1).astype(np.int64)


def compressed_tensors(t: dict, name: str, config: dict) -> np.ndarray:
    n, k = t[f"{name}.weight_shape"].tolist()
    codes = nibbles(t[f"{name}.weight_packed"].numpy())[:, :k] - 8
    scale = t[f"{name}.weight_scale"].float().numpy()
    group = k // scale.shape[1]
    zero = np.zeros_like(scale)
    if f"{name}.weight_zero_point" in t:
        zero = nibbles(t[f"{name}.weight_zero_point"].numpy().T).T[:n] - 8
    return (codes - np.repeat(zero, group, 1)) * np.repeat(scale, group, 1)


def gptq(t: dict, name: str, config: dict) -> np.ndarray:
    codes = nibbles(t[f"{name}.qweight"].numpy().T.copy()).T  # [K, N]
    zeros = nibbles(t[f"{name}.qzeros"].numpy())  # [G, N]
    if config["checkpoint_format"] == "gptq":
        zeros = zeros + 1
    scale = t[f"{name}.scales"].float().numpy()
    index = t[f"{name}.g_idx"].numpy()
    return ((codes - zeros[index]) * scale[index]).T


def awq(t: dict, name: str, config: dict) -> np.ndarray:
    def ordered(words):
        flat = nibbles(words).reshape(words.shape[0], -1, 8)
        out = np.empty_like(flat)
        for i, column in enumerate(AWQ_ORDER):
            out[:, :, column] = flat[:, :, i]
        return out.reshape(words.shape[0], -1)

    codes = ordered(t[f"{name}.qweight"].numpy())  # [K, N]
    zeros = ordered(t[f"{name}.qzeros"].numpy())
    scale = t[f"{name}.scales"].float().numpy()
    group = codes.shape[0] // scale.shape[0]
    return ((codes - np.repeat(zeros, group, 0)) * np.repeat(scale, group, 0)).T


LAYOUTS = {
    "compressed-tensors": ("weight_packed", compressed_tensors),
    "gptq": ("qweight", gptq),
    "awq": ("qweight", awq),
    "safetensors": (None, None),
}


def weights_of(folder: str, layout: str) -> tuple[dict, dict, int]:
    tensors = {}
    for file in sorted(os.listdir(folder)):
        if file.endswith(".safetensors"):
            tensors.update(load_file(os.path.join(folder, file)))
    config = json.load(open(os.path.join(folder, "config.json")))
    suffix, unpack = LAYOUTS[layout]
    if suffix is None:
        return {k: v.float() for k, v in tensors.items()}, config, 0
    names = [key[: -len(suffix) - 1] for key in tensors if key.endswith(f".{suffix}")]
    quantization = config.pop("quantization_config")
    out = {key: value for key, value in tensors.items() if not any(key.startswith(f"{n}.") and key != f"{n}.bias" for n in names)}
    for name in names:
        out[f"{name}.weight"] = torch.from_numpy(unpack(tensors, name, quantization).astype(np.float32))
    return {k: v.float().contiguous() for k, v in out.items()}, config, len(names)


root, tokens_file, logits_file = sys.argv[1:4]
reference, config, count = weights_of(os.path.join(root, "compressed-tensors"), "compressed-tensors")
result = {"linears": count, "differences": {}}
for layout in LAYOUTS:
    folder = os.path.join(root, layout)
    if layout == "compressed-tensors" or not os.path.isdir(folder):
        continue
    other, _, linears = weights_of(folder, layout)
    assert other.keys() == reference.keys(), (layout, other.keys() ^ reference.keys())
    worst = max(float((other[k] - reference[k]).abs().max() / reference[k].abs().max().clamp_min(1e-30)) for k in reference)
    result["differences"][layout] = worst
tokens = torch.tensor(json.load(open(tokens_file)))
with tempfile.TemporaryDirectory() as plain:
    config["dtype"] = "float32"
    json.dump(config, open(os.path.join(plain, "config.json"), "w"))
    save_file(reference, os.path.join(plain, "model.safetensors"), {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(tokens).logits.float()
logits.numpy().astype("<f4").tofile(logits_file)
print(json.dumps(result))

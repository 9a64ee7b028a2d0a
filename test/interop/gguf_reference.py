"""What llama.cpp's converter writes for a Llama folder, by gguf-py's own tables: metadata keys and values, tensor names,
shapes and values. Compared with a GGUF file that was made from the folder. Prints JSON.

transformers' converter is not a package; this follows convert_hf_to_gguf.py's LlamaModel step by step with gguf-py's
constants (Keys), tensor map (get_tensor_name_map) and vocabulary reader (gguf.LlamaHfVocab / SpecialVocab).
Usage: gguf_reference.py FOLDER FILE.gguf
"""
import json
import os
import sys

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

folder, path = sys.argv[1:3]
config = json.load(open(os.path.join(folder, "config.json")))
tensors = load_file(os.path.join(folder, "model.safetensors"))
reader = gguf.GGUFReader(path)
got_keys = {name for name in reader.fields if not name.startswith("GGUF.")}
K, arch = gguf.Keys, "llama"
heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
head_dim = config.get("head_dim") or config["hidden_size"] // heads
rope = config.get("rope_parameters") or config
expected = {
    K.General.ARCHITECTURE: arch,
    K.General.TYPE: "model",
    K.LLM.BLOCK_COUNT.format(arch=arch): config["num_hidden_layers"],
    K.LLM.CONTEXT_LENGTH.format(arch=arch): config["max_position_embeddings"],
    K.LLM.EMBEDDING_LENGTH.format(arch=arch): config["hidden_size"],
    K.LLM.FEED_FORWARD_LENGTH.format(arch=arch): config["intermediate_size"],
    K.Attention.HEAD_COUNT.format(arch=arch): heads,
    K.Attention.HEAD_COUNT_KV.format(arch=arch): kv,
    K.Attention.LAYERNORM_RMS_EPS.format(arch=arch): config["rms_norm_eps"],
    K.Attention.KEY_LENGTH.format(arch=arch): head_dim,
    K.Attention.VALUE_LENGTH.format(arch=arch): head_dim,
    K.Rope.FREQ_BASE.format(arch=arch): rope["rope_theta"],
    K.Rope.DIMENSION_COUNT.format(arch=arch): head_dim,
    K.LLM.VOCAB_SIZE.format(arch=arch): config["vocab_size"],
    K.General.FILE_TYPE: int(gguf.LlamaFileType.MOSTLY_BF16),
    K.General.QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION,
    K.Tokenizer.MODEL: "gpt2",
}
problems = []


def value(name):
    return reader.fields[name].contents()


for key, want in expected.items():
    if key not in got_keys:
        problems.append(f"missing key {key}")
    elif value(key) != want and not (isinstance(want, float) and abs(value(key) - want) <= 1e-7 * abs(want)):
        problems.append(f"{key}: {value(key)} for {want}")

# Tokenizer, as get_vocab_base and SpecialVocab make it.
tokenizer = json.load(open(os.path.join(folder, "tokenizer.json")))
vocab = dict(tokenizer["model"]["vocab"])
added = {token["id"]: token for token in tokenizer["added_tokens"]}
by_id = {i: t for t, i in vocab.items()} | {i: t["content"] for i, t in added.items()}
tokens = [by_id.get(i, f"[PAD{i}]") for i in range(config["vocab_size"])]
types = []
for i in range(config["vocab_size"]):
    if i not in by_id:
        types.append(int(gguf.TokenType.UNUSED))
    elif i in added:
        types.append(int(gguf.TokenType.CONTROL if added[i]["special"] else gguf.TokenType.USER_DEFINED))
    else:
        types.append(int(gguf.TokenType.NORMAL))
special = gguf.SpecialVocab(folder, load_merges=True)
lists = {K.Tokenizer.LIST: tokens, K.Tokenizer.TOKEN_TYPE: types, K.Tokenizer.MERGES: special.merges}
for key, want in lists.items():
    if key not in got_keys or list(value(key)) != list(want):
        problems.append(f"{key} differs")
names = {"bos": K.Tokenizer.BOS_ID, "eos": K.Tokenizer.EOS_ID, "pad": K.Tokenizer.PAD_ID, "unk": K.Tokenizer.UNK_ID}
for kind, token in special.special_token_ids.items():
    key = names.get(kind)
    if key and (key not in got_keys or value(key) != token):
        problems.append(f"{key}: {value(key) if key in got_keys else None} for {token}")
for kind, want in special.add_special_token.items():
    key = f"tokenizer.ggml.add_{kind}_token"
    if key not in got_keys or value(key) != want:
        problems.append(f"{key}: {value(key) if key in got_keys else None} for {want}")
if special.chat_template is not None and (K.Tokenizer.CHAT_TEMPLATE not in got_keys or value(K.Tokenizer.CHAT_TEMPLATE) != special.chat_template):
    problems.append("chat template differs")

# Tensors: names by the tensor map, rows of q and k permuted (LlamaModel.permute).
name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])


def permute(weights, n_head, n_head_kv):
    n_head = n_head_kv if n_head_kv is not None and n_head != n_head_kv else n_head
    shape = weights.shape
    return weights.reshape(n_head, 2, shape[0] // n_head // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


want_tensors = {}
for name, tensor in tensors.items():
    if name == "lm_head.weight" and config.get("tie_word_embeddings"):
        continue
    data = tensor.float().numpy()
    if name.endswith("q_proj.weight"):
        data = permute(data, heads, heads)
    elif name.endswith("k_proj.weight"):
        data = permute(data, heads, kv)
    want_tensors[name_map.get_name(name, try_suffixes=(".weight", ".bias"))] = (data, tensor.ndim == 1)
got_tensors = {tensor.name: tensor for tensor in reader.tensors}
for name in sorted(want_tensors.keys() ^ got_tensors.keys()):
    problems.append(f"tensor {name} is {'missing' if name in want_tensors else 'too many'}")
for name in want_tensors.keys() & got_tensors.keys():
    data, is_vector = want_tensors[name]
    tensor = got_tensors[name]
    want_type = gguf.GGMLQuantizationType.F32 if is_vector else gguf.GGMLQuantizationType.BF16
    if tensor.tensor_type != want_type:
        problems.append(f"{name}: {tensor.tensor_type.name} for {want_type.name}")
        continue
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    if values.size != data.size or not np.array_equal(values.reshape(data.shape), data):
        problems.append(f"{name}: other values")
known = {v for holder in (K.General, K.LLM, K.Attention, K.Rope, K.Tokenizer) for v in vars(holder).values() if isinstance(v, str)}
unknown = sorted(k for k in got_keys if k not in {v.replace("{arch}", arch) for v in known})
compared = expected.keys() | lists.keys() | {names[kind] for kind in special.special_token_ids if kind in names}
compared |= {f"tokenizer.ggml.add_{kind}_token" for kind in special.add_special_token}
compared |= {K.Tokenizer.CHAT_TEMPLATE} if special.chat_template is not None else set()
more = sorted(got_keys - compared)
print(json.dumps({"problems": problems, "tensors": len(got_tensors), "unknown_keys": unknown, "more_keys": more}))

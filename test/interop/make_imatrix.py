"""Importance matrices in llama.cpp's two forms, written with gguf-py and struct (tools/imatrix/imatrix.cpp).
Usage: make_imatrix.py OUT.gguf OUT.dat; prints the means that a reader must find."""
import json
import struct
import sys

import numpy as np
from gguf import GGUFWriter

rng = np.random.default_rng(3)
counts = {"blk.0.attn_q.weight": [40.0], "blk.0.ffn_down_exps.weight": [8.0, 32.0]}
sums = {name: rng.random((len(count), 64)).astype(np.float32) * 100 for name, count in counts.items()}

writer = GGUFWriter(sys.argv[1], "")
writer.kv_data[0].clear()
writer.add_string("general.type", "imatrix")
writer.add_array("imatrix.datasets", ["a.txt"])
writer.add_uint32("imatrix.chunk_count", 1)
writer.add_uint32("imatrix.chunk_size", 512)
for name, value in sums.items():
    count = np.array(counts[name], dtype=np.float32)
    experts = len(count)
    writer.add_tensor(f"{name}.in_sum2", value.reshape(experts, 64) if experts > 1 else value.reshape(64))
    writer.add_tensor(f"{name}.counts", count.reshape(experts, 1) if experts > 1 else count)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

means = {name: (value / np.array(counts[name], dtype=np.float32)[:, None]).reshape(-1) for name, value in sums.items()}
calls = 5
with open(sys.argv[2], "wb") as file:
    file.write(struct.pack("<i", len(means)))
    for name, value in means.items():
        encoded = name.encode()
        file.write(struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", calls, len(value)))
        file.write((value * calls).astype("<f4").tobytes())
    file.write(struct.pack("<i", 1) + struct.pack("<i", 5) + b"a.txt")
print(json.dumps({name: [round(float(v), 4) for v in value] for name, value in means.items()}))

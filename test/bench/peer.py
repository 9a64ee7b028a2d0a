"""The same operations in PyTorch and numpy, on request: reads lines of JSON, answers with seconds (best of reps)."""

import json
import os
import sys
import time

threads = sys.argv[1]
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = threads
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

torch.set_num_threads(int(threads))
dtypes = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
made: dict[str, object] = {}


def tensors(key: str, make):
    if key not in made:
        made.clear()
        made[key] = make()
    return made[key]


def run(op: str, dtype: str, shape: list[int]):
    key = f"{op} {dtype} {shape}"
    d = dtypes[dtype]
    if op == "linear":  # x [M,K] W [N,K]'
        m, n, k = shape
        x, w = tensors(key, lambda: (torch.randn(m, k).to(d), torch.randn(n, k).to(d)))
        return lambda: F.linear(x, w)
    if op == "numpy":
        m, n, k = shape
        x, w = tensors(key, lambda: (np.random.rand(m, k).astype("f4"), np.random.rand(n, k).astype("f4")))
        return lambda: x @ w.T
    if op == "attention":  # [B,S,H,D], key heads
        b, s, h, hk, dim = shape
        q, k, v = tensors(key, lambda: [torch.randn(b, n, s, dim).to(d) for n in (h, hk, hk)])
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if op == "rmsnorm":
        x, w = tensors(key, lambda: (torch.randn(*shape).to(d), torch.randn(shape[-1]).to(d)))
        return lambda: F.rms_norm(x, (shape[-1],), w, 1e-6)
    if op == "swiglu":
        x, y = tensors(key, lambda: (torch.randn(*shape).to(d), torch.randn(*shape).to(d)))
        return lambda: F.silu(x) * y
    if op == "softmax":
        x = tensors(key, lambda: torch.randn(*shape).to(d))
        return lambda: torch.softmax(x, -1)
    if op == "cast":
        x = tensors(key, lambda: torch.randn(*shape))
        return lambda: x.to(d)
    if op == "transpose":
        x = tensors(key, lambda: torch.randn(*shape).to(d))
        return lambda: x.t().contiguous()
    raise ValueError(op)


print(json.dumps({"torch": torch.__version__, "numpy": np.__version__}), flush=True)
for line in sys.stdin:
    ask = json.loads(line)
    f = run(ask["op"], ask["dtype"], ask["shape"])
    best = 1e9
    with torch.inference_mode():
        for _ in range(ask["reps"]):
            begin = time.perf_counter()
            f()
            best = min(best, time.perf_counter() - begin)
    print(json.dumps(best), flush=True)

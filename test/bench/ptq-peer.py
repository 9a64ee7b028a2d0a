"""The plain PyTorch GPTQ loop over a Hugging Face decoder, as Python tools run it (llm-compressor, GPTQModel): layer by
layer, one window at a time, a forward pass with a Hessian a linear, GPTQ of each linear, a forward pass with the new
weights. Weights stay in memory, nothing is written. usage: ptq-peer.py MODEL SAMPLES SEQ_LEN THREADS
Answers with one line of JSON: seconds and CPU seconds by stage."""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

from gptq import sweep

model_path, samples, length, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
torch.manual_seed(0)


def solve(w: torch.Tensor, h: torch.Tensor, group: int = 128) -> torch.Tensor:
    """w [N,K], h [K,K]: the dequantized weights. Works on W', whose columns are contiguous."""
    wt = w.T.contiguous().clone()
    order = torch.argsort(h.diagonal(), descending=True)  # static activation order
    scale = (wt.view(wt.shape[0] // group, group, -1).abs().amax(1) / 7.5).clamp(min=1e-9)[order // group]
    q = sweep(wt[order], h[order][:, order], lambda j: scale[j])
    return q[torch.argsort(order)].T.contiguous()


stages: dict[str, list[float]] = {}


def timed(name: str, run):
    begin, cpu = time.perf_counter(), time.process_time()
    result = run()
    wall, used = stages.setdefault(name, [0.0, 0.0])
    stages[name] = [wall + time.perf_counter() - begin, used + time.process_time() - cpu]
    return result


@torch.inference_mode()
def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    # The precision in which this machine multiplies faster.
    a, b = torch.randn(2048, 512), torch.randn(512, 2048)
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, y = a.to(dtype), b.to(dtype)
        x @ y
        begin = time.perf_counter()
        for _ in range(5):
            x @ y
        best[dtype] = time.perf_counter() - begin
    dtype = min(best, key=best.get)
    model.to(dtype)
    decoder = model.model
    ids = torch.randint(0, model.config.vocab_size, (samples, length))
    states = [decoder.embed_tokens(row[None]) for row in ids]
    position = torch.arange(length)[None]
    rope = decoder.rotary_emb(states[0], position)

    def forward(layer) -> list[torch.Tensor]:
        out = [layer(x, position_embeddings=rope, attention_mask=None, position_ids=position) for x in states]
        return [o[0] if isinstance(o, tuple) else o for o in out]

    for layer in decoder.layers:
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        hessians = {n: torch.zeros(m.in_features, m.in_features) for n, m in linears.items()}

        def hook(name: str):
            def add(_, args) -> None:
                x = args[0].reshape(-1, args[0].shape[-1]).float()
                hessians[name].addmm_(x.T, x)

            return add

        hooks = [m.register_forward_pre_hook(hook(n)) for n, m in linears.items()]
        timed("forward and Hessians", lambda layer=layer: forward(layer))
        for one in hooks:
            one.remove()
        for name, linear in linears.items():
            q = timed("solve", lambda name=name, linear=linear: solve(linear.weight.float(), hessians[name] / (samples * length)))
            linear.weight.copy_(q)
        states[:] = timed("forward again", lambda layer=layer: forward(layer))
    print(json.dumps({"torch": torch.__version__, "dtype": str(dtype).split(".")[1], "stages": stages}))


main()

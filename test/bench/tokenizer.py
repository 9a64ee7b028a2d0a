"""Trains the Hugging Face tokenizers library as test/bench/tokenizer.mjs asks; prints its seconds and its merges' hash.

    .venv/bin/python test/bench/tokenizer.py TEXT TOKENIZER_JSON

The pre-tokenizer, the special tokens and the vocabulary's size are those of the tokenizer.json that was made beside it.
"""

import hashlib
import json
import sys
import time

from tokenizers import Tokenizer, pre_tokenizers, trainers

text, source = sys.argv[1:]
theirs = json.load(open(source))
tokenizer = Tokenizer.from_str(json.dumps({**theirs, "added_tokens": [], "post_processor": None, "model": {"type": "BPE", "vocab": {}, "merges": []}}))
trainer = trainers.BpeTrainer(
    vocab_size=len(theirs["model"]["vocab"]),
    min_frequency=2,
    special_tokens=[token["content"] for token in theirs["added_tokens"]],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
)
begin, cpu = time.perf_counter(), time.process_time()
tokenizer.train([text], trainer)
seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
merges = "\n".join(" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"])
print(json.dumps({"seconds": seconds, "cpu": cpu, "merges": hashlib.sha256(merges.encode()).hexdigest()}))

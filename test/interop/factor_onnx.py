"""Replaces q and up projections of an exported graph, in place, by two matrix products in a row (through a random
invertible matrix, wider than either side). Prints the linears. Usage: factor_onnx.py FOLDER"""
import json
import sys

import numpy as np
import onnx
from onnx import helper, numpy_helper

path = f"{sys.argv[1]}/model.onnx"
model = onnx.load(path)
graph = model.graph
weights = {tensor.name: tensor for tensor in graph.initializer}
rng = np.random.default_rng(7)
made, nodes = [], []
for node in graph.node:
    name = node.input[1] if len(node.input) > 1 else ""
    if node.op_type != "MatMul" or not any(part in name for part in ("q_proj", "up_proj")):
        nodes.append(node)
        continue
    weight = numpy_helper.to_array(weights[name]).astype(np.float64)  # [K, N]
    k, n = weight.shape
    width = 2 * max(k, n)
    first = rng.standard_normal((k, width)) / np.sqrt(k)
    second = np.linalg.pinv(first) @ weight
    assert np.allclose(first @ second, weight)
    graph.initializer.remove(weights[name])
    for suffix, value in (("first", first), ("second", second)):
        graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), f"onnx::MatMul_{len(made)}_{suffix}"))
    inner = f"{node.output[0]}_inner"
    nodes.append(helper.make_node("MatMul", [node.input[0], f"onnx::MatMul_{len(made)}_first"], [inner], node.name))
    nodes.append(helper.make_node("MatMul", [inner, f"onnx::MatMul_{len(made)}_second"], list(node.output), f"{node.name}_1"))
    made.append(node.name)
del graph.node[:]
graph.node.extend(nodes)
onnx.save(model, path, save_as_external_data=True, location="factored.data", size_threshold=0)
print(json.dumps({"made": made}))

"""onnx.checker on an exported folder, as far as its operators allow. Prints JSON.

The checker knows ONNX's own operators only. SimplifiedLayerNormalization is onnxruntime's, registered in ONNX's own
domain: it is taken for RMSNormalization of opset 23 (the same formula) for the check. Operators of com.microsoft are
passed over by the checker itself.
Usage: check_onnx.py FOLDER
"""
import json
import os
import sys

import onnx

path = f"{sys.argv[1]}/model.onnx"
model = onnx.load(path, load_external_data=False)
renamed = 0
for node in model.graph.node:
    if node.op_type == "SimplifiedLayerNormalization":
        node.op_type = "RMSNormalization"
        renamed += 1
for opset in model.opset_import:
    if opset.domain == "" and renamed:
        opset.version = 23
checked = f"{sys.argv[1]}/checked.onnx"
with open(checked, "wb") as file:
    file.write(model.SerializeToString())
onnx.checker.check_model(checked)
os.remove(checked)
domains = sorted({f"{n.domain or 'ai.onnx'}.{n.op_type}" for n in model.graph.node})
inferred = onnx.shape_inference.infer_shapes(model, check_type=True)
print(json.dumps({"nodes": len(model.graph.node), "initializers": len(model.graph.initializer), "operators": domains,
                  "renamed": renamed, "outputs": [o.name for o in inferred.graph.output]}))

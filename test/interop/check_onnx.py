"""onnx.checker on exported folders, as far as their operators allow. Prints a JSON array.

The checker knows ONNX's own operators only. SimplifiedLayerNormalization is onnxruntime's, registered in ONNX's own
domain: it is taken for RMSNormalization of opset 23 (the same formula) for the check. Operators of com.microsoft are
passed over by the checker itself.
Usage: check_onnx.py FOLDER...
"""
import json
import os
import sys

import onnx



def check(folder: str) -> dict:
    model = onnx.load(f"{folder}/model.onnx", load_external_data=False)
    renamed = 0
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.op_type = "RMSNormalization"
            renamed += 1
    for opset in model.opset_import:
        if opset.domain == "" and renamed:
            opset.version = 23
    checked = f"{folder}/checked.onnx"
    with open(checked, "wb") as file:
        file.write(model.SerializeToString())
    onnx.checker.check_model(checked)
    os.remove(checked)
    onnx.shape_inference.infer_shapes(model, check_type=True)
    return {"operators": sorted({f"{n.domain or 'ai.onnx'}.{n.op_type}" for n in model.graph.node})}


print(json.dumps([check(folder) for folder in sys.argv[1:]]))

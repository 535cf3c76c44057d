"""Import of ONNX step graphs as steps in normal form."""

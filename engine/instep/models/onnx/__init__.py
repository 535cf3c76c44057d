"""Graphs in ONNX: step graphs that onnxruntime computes, and recurrent nodes that become a kind of their own."""

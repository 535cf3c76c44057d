"""Graphs in ONNX: step graphs become steps in their normal form, and recurrent layers models of their kinds."""

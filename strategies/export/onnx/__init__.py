"""The student for ONNX Runtime."""

"""What the backends share: a program as a lowered graph, and that as ONNX with neutral nodes for a dialect."""

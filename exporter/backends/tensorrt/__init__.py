"""The TensorRT target: its dialect of the quantized graph, and the engine built from it."""

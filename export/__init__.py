"""VGG-19 as ONNX graphs: the network, its weights, the forward and the VJP graph."""

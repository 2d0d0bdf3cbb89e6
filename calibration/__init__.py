"""FP16 and INT8 that keep the answers: calibration, precision written into the graph, and accuracy retention."""

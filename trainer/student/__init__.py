"""From the trained model to the student: quantized, exported, reloaded and compared."""

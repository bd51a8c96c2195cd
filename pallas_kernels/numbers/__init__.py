"""What a code means: number formats, and the one definition of quantize and dequantize."""

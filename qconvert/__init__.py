"""qconvert turns full-precision checkpoints into quantized ones, and proves them."""

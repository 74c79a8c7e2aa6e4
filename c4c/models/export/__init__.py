"""Models in the layouts of other programs, a file a layout; `python -m c4c.export` writes them.

c4c_file      one safetensors file that describes itself        official      the official CLIP4Clip's own layout
openclip      a folder as open_clip loads it (`local-dir:`)     huggingface   a folder as transformers loads it
onnx          graphs of the two encoders, and of the score
"""

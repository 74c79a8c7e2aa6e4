"""All that knows DeepSpeed.

engine      the model in an engine; keys: the configuration that users may pass on
state       weights and moments, whatever ZeRO has made of them; checkpoint: to disk and back
distributed     ranks that find each other
"""

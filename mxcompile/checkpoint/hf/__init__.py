"""What transformers needs to load, run and save a quantized model, and what it says about a model in files.

registration.py  registers all of it with transformers; marks models as quantized
quantizer.py     the `HfQuantizer` with which `from_pretrained` reads our checkpoints
experts.py       our implementation of a layer of experts, "mx"
methods.py       methods of a quantized model that replace those of transformers
models.py        saves a model's configuration, and builds the model again
source.py        a model without values, and which stored tensors make each of its tensors
"""

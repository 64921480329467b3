"""Checkpoints: a quantized module in a folder, as Hugging Face lays one out, and read again.

    config.json                        what made it, and which index counts           (config_json.py)
    model.safetensors.index.json       what the tensors are, in which file, checksums (index.py)
    model-00001-of-00001.safetensors   the tensors                                    (shards.py, stored_tensors.py)
    tokenizer.json, ...                what came along

A save changes a folder at one moment (atomic_folder.py); a load checks everything before it returns anything
(reader.py). transformers reads such folders too, by a quantizer that `import mxcompile`
registers (hf_registration.py).
Other projects' checkpoints are the business of interop/.
"""

from mxcompile.checkpoint.hf_registration import register
from mxcompile.checkpoint.interop.foreign import is_foreign, read_gguf
from mxcompile.checkpoint.load import load
from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.checkpoint.save import adopt, check_free, save

__all__ = ["Checkpoint", "adopt", "check_free", "is_foreign", "load", "read_gguf", "register", "save"]

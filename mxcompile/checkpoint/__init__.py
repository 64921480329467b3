"""Save a quantized module to a folder in Hugging Face's layout, and load it.

    config.json                        recipe, versions, and the name of the index     (config_json.py)
    model.safetensors.index.json       metadata, file and checksum of each tensor      (index.py)
    model-00001-of-00001.safetensors   the tensors                                     (shards.py, stored_tensors.py)
    tokenizer.json, ...                auxiliary files

A save replaces a checkpoint atomically (save_transaction.py). A load checks everything before it returns anything
(reader.py). transformers reads these folders through a quantizer that `import mxcompile` registers
(hf/registration.py). interop/ reads and writes other projects' formats.
"""

from mxcompile.checkpoint.hf.registration import mark_quantized, register
from mxcompile.checkpoint.interop.foreign import is_foreign, is_gguf, read_gguf, read_gguf_tokenizer
from mxcompile.checkpoint.load import load
from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.checkpoint.save import check_destination, check_model, save

__all__ = [
    "Checkpoint",
    "check_destination",
    "check_model",
    "is_foreign",
    "is_gguf",
    "load",
    "mark_quantized",
    "read_gguf",
    "read_gguf_tokenizer",
    "register",
    "save",
]

"""Read and write other projects' checkpoints; `foreign.py` recognizes their formats.

    compressed_tensors.py  what llm-compressor writes: MXFP4, MXFP6 (E2M3), MXFP8 (E4M3)
    gpt_oss.py             gpt-oss with its experts in MXFP4, read only
    gguf_model.py          MXFP4 in llama.cpp's files: read; gguf_writer.py: written; gguf_file.py: the container;
                           gguf_architectures.py, gguf_experts.py, gguf_tokenizer.py, gguf_pretokenizers.py: its names

Shared: memory layouts of elements (element_layouts.py), files (files.py), building a model (build_model.py), the
names under which a model is stored (stored_names.py), all experts in one parameter (fused_experts.py).
"""

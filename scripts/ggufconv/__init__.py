"""Turns a GGUF file into a model directory in the Hugging Face layout.

reader     the container: header, metadata, tensor list, all bounds checked
dequant    quantized blocks to float32, float32 to bfloat16
hf_model   config.json and the tensors' names, shapes and row order
hf_tokenizer  tokenizer.json and its neighbours
output     safetensors and a directory that appears whole or not at all
"""

"""The backend "vllm_export": a packed model as compressed-tensors, which vLLM and transformers load.

Writing needs nothing beside kbitc; comparing needs the extra [vllm].
"""

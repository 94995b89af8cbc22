"""The backend "gguf_export": a packed language model as one GGUF file, which llama.cpp and Ollama run.

Writing needs the extra [gguf]; running the file to compare it needs llama-cpp-python.
"""

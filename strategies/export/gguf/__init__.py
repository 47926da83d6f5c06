"""The student for llama.cpp."""

"""The language: programs, their control flow, views of parameters, and the interpreter."""

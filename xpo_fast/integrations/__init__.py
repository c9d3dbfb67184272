"""Where people already are: one module a library, each of which imports that library only when it must."""

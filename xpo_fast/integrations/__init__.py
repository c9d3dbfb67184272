"""Other libraries' names on this engine: one folder per library, which imports that library only if it needs it."""

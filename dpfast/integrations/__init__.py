"""dpfast under other libraries' training loops. Nothing here is imported by the rest of the package."""

"""What only a GPU can show. Skipped without one."""

"""Find what a program costs: time, memory, and what it never gives back."""

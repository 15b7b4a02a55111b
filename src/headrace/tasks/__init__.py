"""Tasks that outlive the processes that run them: the store, delivery, workers and their HTTP routes."""

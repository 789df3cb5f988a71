"""How the processes of one training run share a private step."""

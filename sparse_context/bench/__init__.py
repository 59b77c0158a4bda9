"""How long a call takes, and where the time goes."""

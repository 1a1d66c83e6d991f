"""Stage 1 of the paper: pre-training a backbone on unlabelled images."""

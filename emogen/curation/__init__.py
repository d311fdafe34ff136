"""Which labels are wrong, and which rows to label next."""

"""Networks out: to the programs where they are deployed."""

"""What an experiment will cost, before it runs: work counted from its config, its units timed here."""

"""Sweeps: resumable trials, and a Hydra sweeper on Optuna whose workers share one study and prune trials."""

"""A Hydra sweeper on Optuna, `hydra/sweeper=optuna`: several workers share one study, and trials can be pruned."""

"""Lightning callbacks: evaluation, figures, triplet mining, and what long trainings need."""

"""Lightning callbacks: evaluation, pictures, the mining pool, what long trainings want."""

"""One run in one process: batches and who holds them, what is left to do, and the stages that do it."""

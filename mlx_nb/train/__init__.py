"""The trainer, its optimizer, update step, task queue, batches and exact checkpoints."""

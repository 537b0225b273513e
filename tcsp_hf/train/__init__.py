"""Training: fine-tuning dense models, and compressing and distilling in one go."""

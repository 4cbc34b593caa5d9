"""Several GPUs: process groups, peer memory, and fused all-reduces on it."""

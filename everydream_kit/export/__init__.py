"""What leaves the kit: single files that image apps load, and models on the Hugging Face Hub. Reads checkpoints on disk only."""
